"""Who runs a step: this process alone, or together with the processes of the other tensor-parallel ranks."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from engine.config import EngineConfig
from engine.framing import read_frame, write_frame
from engine.loader import check_ranks, load_model
from engine.machine import usable_cores
from engine.messages import Picture
from engine.runner import ModelRunner, StepLogits
from engine.scheduler import ChunkInput, Command, Encode, Run, Scrub, Trim
from engine.tensor_parallel import Ranks
from processes.environment import child_environment

logger = logging.getLogger(__name__)

JOIN_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other, loading included. A rank that dies is noticed at once, without this."""


class RankSetup(msgspec.Struct):
    """The first frame to a rank's process: what it serves, and where the ranks meet."""

    config: EngineConfig
    rank: int
    meeting: str


class Executor(ABC):
    """What the engine asks of the model; see `ModelRunner` for the meanings."""

    runner: ModelRunner
    isolates_failures: bool
    """A failed call has left the executor usable, so the engine may go on with the other requests."""

    @abstractmethod
    def run(self, chunks: list[ChunkInput]) -> StepLogits: ...

    @abstractmethod
    def encode(self, pictures: list[Picture]) -> None: ...

    @abstractmethod
    def trim(self, keep: list[bytes]) -> None: ...

    @abstractmethod
    def scrub(self, blocks: list[int]) -> None: ...


class LocalExecutor(Executor):
    isolates_failures = True

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner

    def run(self, chunks: list[ChunkInput]) -> StepLogits:
        return self.runner.run(chunks)

    def encode(self, pictures: list[Picture]) -> None:
        self.runner.encode(pictures)

    def trim(self, keep: list[bytes]) -> None:
        self.runner.encoder_cache.trim(keep)

    def scrub(self, blocks: list[int]) -> None:
        self.runner.kernel.scrub(blocks)


class ParallelExecutor(Executor):
    """Rank 0, which starts the others and tells each of them every command before it follows it itself.

    Ranks that differ in what they have done cannot be brought back together, so a failure ends the process
    (and with it the others); the front starts them all anew.
    """

    isolates_failures = False

    def __init__(self, config: EngineConfig) -> None:
        check_ranks(config.model_path, config.tensor_parallel_degree)
        self._encoder = msgspec.msgpack.Encoder()
        folder = tempfile.TemporaryDirectory(prefix="lmi-ranks-")
        meeting = str(Path(folder.name, "meeting"))
        self._sockets = [
            _spawn(RankSetup(config, rank, meeting)) for rank in range(1, config.tensor_parallel_degree)
        ]
        with folder:
            self.runner = load_rank(RankSetup(config, 0, meeting))

    def run(self, chunks: list[ChunkInput]) -> StepLogits:
        logits = self._tell(Run(chunks))
        assert logits is not None
        return logits

    def encode(self, pictures: list[Picture]) -> None:
        self._tell(Encode(pictures))

    def trim(self, keep: list[bytes]) -> None:
        self._tell(Trim(keep))

    def scrub(self, blocks: list[int]) -> None:
        self._tell(Scrub(blocks))

    def _tell(self, command: Command) -> StepLogits | None:
        body = self._encoder.encode(command)
        for sock in self._sockets:
            write_frame(sock, body)
        return self.runner.execute(command)


def load_runner(config: EngineConfig) -> ModelRunner:
    """The whole model on the one device."""
    device = torch.device(config.devices[0])
    return ModelRunner(config, load_model(config, device), device)


def load_rank(setup: RankSetup) -> ModelRunner:
    """This rank's part of the model; returns when all ranks have theirs. Raises ModelLoadError."""
    config, size = setup.config, setup.config.tensor_parallel_degree
    device = torch.device(config.devices[setup.rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{setup.meeting}",
        rank=setup.rank,
        world_size=size,
        timeout=JOIN_TIMEOUT,
    )
    runner = ModelRunner(config, load_model(config, device, Ranks(setup.rank, size)), device)
    dist.barrier()
    return runner


def follow(sock: socket.socket) -> None:
    """The life of a rank other than 0: do what rank 0 does, until it is gone."""
    frame = read_frame(sock)
    if frame is None:
        return
    setup = msgspec.msgpack.decode(frame, type=RankSetup)
    torch.set_num_threads(threads_for(setup.config))
    runner = load_rank(setup)
    torch.set_num_threads(threads_for(setup.config, runner.weight_bytes))
    decoder = msgspec.msgpack.Decoder(Command)
    while (frame := read_frame(sock)) is not None:
        runner.execute(decoder.decode(frame))


BYTES_PER_THREAD = 64 << 20
"""Weights for which another thread is worth it in a step: with less to read than to wait for each other, a team is
slower than one, and many times slower beside a front that keeps the cores busy with pictures."""


def threads_for(config: EngineConfig, weight_bytes: int | None = None) -> int:
    """The configured number; else OMP_NUM_THREADS where it is set; else this engine's part of the cores, one of them
    left to the front, and no more than so many weights (of this rank; None: not known yet) keep busy."""
    if config.threads:
        return config.threads
    wished = os.environ.get("OMP_NUM_THREADS", "")
    if wished.isdecimal() and int(wished) > 0:
        return int(wished)
    cores = (usable_cores() - 1) * config.cpu_share
    if weight_bytes is not None:
        cores = min(cores, config.tensor_parallel_degree * weight_bytes / BYTES_PER_THREAD)
    return max(1, int(cores / config.tensor_parallel_degree))


def _spawn(setup: RankSetup) -> socket.socket:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "engine.process", "--rank", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env=child_environment("engine"),
        )
    threading.Thread(
        target=_end_with, args=(process, setup.rank), daemon=True, name=f"rank-{setup.rank}"
    ).start()
    write_frame(ours, msgspec.msgpack.encode(setup))
    return ours


def _end_with(process: subprocess.Popen[bytes], rank: int) -> None:
    """A missing rank would leave the others waiting inside a sum: end this process, so that all are restarted."""
    code = process.wait()
    logger.critical("rank %d ended with code %s; ending the whole group", rank, code)
    os._exit(1)
