"""Runs a step: in this process alone, or together with the processes of the other tensor-parallel ranks."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import tempfile
import threading
from abc import ABC, abstractmethod
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from engine.config import EngineConfig
from engine.loader import check_ranks, load_model
from engine.machine import usable_cores
from engine.messages import Picture
from engine.runner import ModelRunner, StepLogits
from engine.scheduler import ChunkInput, Command, Encode, Run, Scrub, Trim
from engine.tensor_parallel import Ranks
from processes.environment import child_command, child_environment
from processes.inside import Frames

logger = logging.getLogger(__name__)

JOIN_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other, loading included. A rank that dies is noticed at once, without this
limit."""


class RankSetup(msgspec.Struct):
    """First message to the process of a rank.

    Attributes:
        config: Settings of the engine.
        rank: Number of the rank.
        meeting: File through which the ranks find each other.
    """

    config: EngineConfig
    rank: int
    meeting: str


class Executor(ABC):
    """Operations of the model that the engine needs; see `ModelRunner` for their meanings."""

    runner: ModelRunner
    isolates_failures: bool
    """Whether the executor is still usable after a failed call, so that the engine may continue with other
    requests."""

    @abstractmethod
    def run(self, chunks: list[ChunkInput]) -> StepLogits: ...

    @abstractmethod
    def encode(self, pictures: list[Picture]) -> None: ...

    @abstractmethod
    def trim(self, keep: list[bytes]) -> None: ...

    @abstractmethod
    def scrub(self, blocks: list[int]) -> None: ...


class LocalExecutor(Executor):
    """Runs the model in this process."""

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
    """Rank 0: it starts the others, and sends each command to them before executing it itself.

    Ranks that have executed different commands cannot be synchronised again, so a failure ends the process,
    and with it the others; the front end restarts all of them.
    """

    isolates_failures = False

    def __init__(self, config: EngineConfig) -> None:
        check_ranks(config.model_path, config.tensor_parallel_degree)
        self._encoder = msgspec.msgpack.Encoder()
        folder = tempfile.TemporaryDirectory(prefix="lmi-ranks-")
        meeting = str(Path(folder.name, "meeting"))
        self._ranks = [
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
        for rank in self._ranks:
            rank.send(body)
        return self.runner.execute(command)


def load_runner(config: EngineConfig) -> ModelRunner:
    """Load the whole model on one device."""
    device = torch.device(config.devices[0])
    return ModelRunner(config, load_model(config, device), device)


def load_rank(setup: RankSetup) -> ModelRunner:
    """Load this rank's part of the model; return when all ranks have theirs.

    Raises:
        ModelLoadError: The model cannot be loaded.
    """
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


def follow(first: Frames) -> None:
    """Run a rank other than 0: execute the commands of rank 0 until it ends."""
    frame = first.receive()
    if frame is None:
        return
    setup = msgspec.msgpack.decode(frame, type=RankSetup)
    torch.set_num_threads(threads_for(setup.config))
    runner = load_rank(setup)
    torch.set_num_threads(threads_for(setup.config, runner.weight_bytes))
    decoder = msgspec.msgpack.Decoder(Command)
    while (frame := first.receive()) is not None:
        runner.execute(decoder.decode(frame))


BYTES_PER_THREAD = 64 << 20
"""Weights for which another thread pays in a step. With less to read, a team of threads is slower than one,
and many times slower beside a front end that keeps the cores busy with images."""


def threads_for(config: EngineConfig, weight_bytes: int | None = None) -> int:
    """Choose the number of threads of a process.

    That is the configured number; else OMP_NUM_THREADS, where it is set; else this engine's part of the
    cores, without one for the front end, and no more than the weights keep busy.

    Args:
        config: Settings of the engine.
        weight_bytes: Bytes of this rank's weights; None if they are not known yet.
    """
    if config.threads:
        return config.threads
    wished = os.environ.get("OMP_NUM_THREADS", "")
    if wished.isdecimal() and int(wished) > 0:
        return int(wished)
    cores = (usable_cores() - 1) * config.cpu_share
    if weight_bytes is not None:
        cores = min(cores, config.tensor_parallel_degree * weight_bytes / BYTES_PER_THREAD)
    return max(1, int(cores / config.tensor_parallel_degree))


def _spawn(setup: RankSetup) -> Frames:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            child_command("engine.process", "--rank", str(theirs.fileno())),
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env=child_environment("engine"),
        )
    threading.Thread(
        target=_end_with, args=(process, setup.rank), daemon=True, name=f"rank-{setup.rank}"
    ).start()
    rank = Frames(ours)
    rank.send(msgspec.msgpack.encode(setup))
    return rank


def _end_with(process: subprocess.Popen[bytes], rank: int) -> None:
    """End this process with the rank, so that all are restarted: the others would wait for it for ever."""
    code = process.wait()
    logger.critical("rank %d ended with code %s; ending the whole group", rank, code)
    os._exit(1)
