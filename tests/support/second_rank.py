"""The second of two tensor-parallel ranks; this process is the first.

An engine starts its other ranks itself, as tests/engine/test_process.py shows; each spends seconds on imports. Here
one process is the second rank of many models, one after the other.
"""

from __future__ import annotations

import atexit
import functools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch.distributed as dist

from engine.config import EngineConfig
from engine.engine import Engine
from engine.executor import Executor, RankSetup, follow, load_rank
from processes.environment import child_command, child_environment
from processes.inside import Frames, die_with_parent
from tests.support.shapes import ROOT


@contextmanager
def two_ranks(path: Path, **settings: object) -> Iterator[Engine]:
    """An engine whose model is shared by two ranks."""
    config = EngineConfig(  # type: ignore[arg-type]
        model_path=str(path), devices=("cpu", "cpu"), **{"dtype": "float32", "kv_cache_bytes": 8 << 20} | settings
    )
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(_second(), [b"m"], [theirs.fileno()])
    second = Frames(ours)
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder, "meeting"))
        second.send(msgspec.msgpack.encode(RankSetup(config, 1, meeting)))
        try:
            yield Engine(config, Executor(load_rank(RankSetup(config, 0, meeting)), [second]))
        finally:
            second.close()
            if dist.is_initialized():
                dist.destroy_process_group()


@functools.cache
def _second() -> socket.socket:
    """The connection to the process, which is started when it is first needed, and ends with this one."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            child_command("tests.support.second_rank", str(theirs.fileno())),
            pass_fds=(theirs.fileno(),),
            env=child_environment("engine"),
            cwd=ROOT,
        )
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def main() -> None:
    die_with_parent()
    control = socket.socket(fileno=int(sys.argv[1]))
    while descriptors := socket.recv_fds(control, 1, 1)[1]:
        follow(Frames(socket.socket(fileno=descriptors[0])))
        dist.destroy_process_group()
    os._exit(0)  # torch's threads need not be awaited


if __name__ == "__main__":
    main()
