"""Runs `bench.stub_engine` in place of the engine's process, where this folder is in PYTHONPATH.

Python imports this module at its start. It knows the engine's process by its command and changes nothing in others.
"""

import os
import sys

if "engine.process" in sys.orig_argv:
    os.execv(sys.executable, [sys.executable, "-P", "-m", "bench.stub_engine", sys.orig_argv[-1]])
