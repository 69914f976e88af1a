"""Runs a step: in this process alone, or together with the processes of the other tensor-parallel ranks."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from engine.commands import Command
from engine.config import EngineConfig
from engine.loader import check_ranks, load_model
from engine.machine import keep_freed_memory, usable_cores
from engine.runner import ModelRunner, StepLogits
from engine.tensor_parallel import Ranks
from processes.environment import child_command, child_environment
from processes.inside import Frames

logger = logging.getLogger(__name__)

JOIN_TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for each other, loading included. A rank that dies is noticed at once, without this limit."""


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


class Executor:
    """Runs the model in this process, which is rank 0 if there are several tensor-parallel ranks.

    Ranks that have executed different commands cannot be synchronised again, so a failure ends the process, and with it
    the others; the front end restarts all of them.
    """

    def __init__(self, runner: ModelRunner, others: Sequence[Frames] = ()) -> None:
        self.runner = runner
        self._others = others
        self._encoder = msgspec.msgpack.Encoder()

    @classmethod
    def load(cls, config: EngineConfig) -> Executor:
        """Load the model on all devices, and start a process for each other rank. Raises ModelLoadError."""
        size = config.tensor_parallel_degree
        if size == 1:
            return cls(load_runner(config))
        check_ranks(config.model_path, size)
        with tempfile.TemporaryDirectory(prefix="lmi-ranks-") as folder:
            setups = [RankSetup(config, rank, str(Path(folder, "meeting"))) for rank in range(size)]
            others = [_spawn(setup) for setup in setups[1:]]
            return cls(load_rank(setups[0]), others)

    @property
    def isolates_failures(self) -> bool:
        """Whether the engine may continue with other requests after a failed call."""
        return not self._others

    def execute(self, command: Command) -> StepLogits | None:
        """Send the command to the other ranks, execute it here too, and return what this rank's runner returns."""
        if self._others:
            body = self._encoder.encode(command)
            for other in self._others:
                other.send(body)
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
    keep_freed_memory()
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
    cores, without one for the front end where there are more than two, and no more than the weights keep busy.

    Args:
        config: Settings of the engine.
        weight_bytes: Bytes of this rank's weights; None if they are not known yet.
    """
    if config.threads:
        return config.threads
    wished = os.environ.get("OMP_NUM_THREADS", "")
    if wished.isdecimal() and int(wished) > 0:
        return int(wished)
    usable = usable_cores()
    cores = (usable - 1 if usable > 2 else usable) * config.cpu_share
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
    threading.Thread(target=_end_with, args=(process, setup.rank), daemon=True, name=f"rank-{setup.rank}").start()
    rank = Frames(ours)
    rank.send(msgspec.msgpack.encode(setup))
    return rank


def _end_with(process: subprocess.Popen[bytes], rank: int) -> None:
    """End this process with the rank, so that all are restarted: the others would wait for it for ever."""
    code = process.wait()
    logger.critical("rank %d ended with code %s; ending the whole group", rank, code)
    os._exit(1)
