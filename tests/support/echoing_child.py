"""A child process for `test_child.py`: answers each message with what it was asked for."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from typing import Any

from processes.inside import Parent, data_bytes


def main() -> None:
    parent = Parent()
    while (message := parent.receive_with_descriptor()) is not None:
        body, descriptor = message
        parent.send(json.dumps(answer(body.decode(), descriptor)).encode())


def answer(question: str, descriptor: int | None) -> Any:
    word, _, rest = question.partition(" ")
    match word:
        case "environment":
            return dict(os.environ)
        case "limits":
            kinds = (resource.RLIMIT_DATA, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)
            return [resource.getrlimit(kind)[0] for kind in kinds]
        case "allocate":
            try:
                return len(bytearray(int(rest)))
            except MemoryError:
                return "MemoryError"
        case "data":
            return data_bytes()
        case "write":
            assert descriptor is not None
            os.write(descriptor, rest.encode())
            os.close(descriptor)
        case "print":
            number, _, line = rest.partition(" ")
            for _ in range(int(number)):
                os.write(2, line.encode() + b"\n")
        case "print_out":
            print(rest, flush=True)
        case "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "length":
            return len(rest)
        case "start":
            return subprocess.Popen(["sleep", "600"]).pid
        case "reply":
            return "x" * int(rest)
        case "flood":
            sys.stdout.flush()
            parent_bytes = b"\xff\xff\xff\x7f"
            os.write(int(sys.argv[-1]), parent_bytes)
    return None


def printed(question: bytes) -> bytes:
    """For the engine process, which answers with what a function returns: says it as a native library might."""
    os.write(1, question)
    return b"done"


if __name__ == "__main__":
    main()
