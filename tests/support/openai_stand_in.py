"""A server that answers as OpenAI's, with known text and statuses, for tests of what asks such servers."""

from __future__ import annotations

import contextlib
import http.server
import json
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class StandIn:
    """Streams `tokens` tokens after `first` seconds, one every `gap` seconds.

    Attributes:
        refuse: Every so manieth request is refused with 429; 0: none is.
        key: Without it, requests are refused with 401, in words that repeat what was sent.
        prefix: What precedes /v1 in its paths.
        log: Shared by several, to see in which order they are asked: the name and the body of each request.
    """

    name: str = "stand-in"
    tokens: int = 4
    first: float = 0.0
    gap: float = 0.0
    refuse: int = 0
    key: str = ""
    prefix: str = ""
    log: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    url: str = ""

    @contextlib.contextmanager
    def open(self, certificate: Path | None = None) -> Iterator[StandIn]:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}{self.prefix}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def _handler(stand_in: StandIn) -> type[http.server.BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            if self._allowed() and self.path == f"{stand_in.prefix}/v1/models":
                self._send(200, {"data": [{"id": f"{stand_in.name}-model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if not self._allowed():
                return
            with lock:
                stand_in.log.append((stand_in.name, body))
                refused = stand_in.refuse and len(stand_in.log) % stand_in.refuse == 0
            assert self.path == f"{stand_in.prefix}/v1/chat/completions"
            if refused:
                self._send(429, {"error": {"message": "too <b>many</b>"}})
                return
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            time.sleep(stand_in.first)
            for number in range(stand_in.tokens):
                self._event({"choices": [{"index": 0, "delta": {"content": f"{number} "}}]})
                time.sleep(stand_in.gap)
            usage = {"prompt_tokens": 9, "completion_tokens": stand_in.tokens}
            self._event({"choices": [], "usage": usage})
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")

        def _allowed(self) -> bool:
            given = self.headers.get("authorization", "")
            if not stand_in.key or given == f"Bearer {stand_in.key}":
                return True
            self._send(401, {"error": {"message": f"{given} is not the key"}})
            return False

        def _event(self, event: dict[str, Any]) -> None:
            self._chunk(f"data: {json.dumps(event)}\n\n".encode())

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

        def _send(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
