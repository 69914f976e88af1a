"""The environment of the processes that the front and the engine start, and their end."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def child_environment() -> dict[str, str]:
    """Ours, with this very package importable: `python -P` keeps the working directory out of the module path."""
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": root if not inherited else f"{root}{os.pathsep}{inherited}"}


def die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies, even in the middle of work; elsewhere the closed
    socket or pipe does it after that work."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
