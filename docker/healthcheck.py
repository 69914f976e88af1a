#!/usr/bin/env python3
"""Exit with 0 when the server's /ping answers 200, else with 1 and the answer."""

import http.client
import os
import sys

port = os.environ.get("SAGEMAKER_BIND_TO_PORT") or os.environ.get("SERVING_PORT") or "8080"
connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=4)
try:
    connection.request("GET", "/ping")
    reply = connection.getresponse()
    print(reply.status, reply.read(500).decode(errors="replace"))
    sys.exit(reply.status != 200)
except OSError as error:
    sys.exit(f"nothing answers on port {port}: {error}")
