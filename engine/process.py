"""The engine's own process: `python -m engine.process FD`, where FD is the socket to the front end.

`--rank FD` is for a further tensor-parallel rank, where FD is the socket to rank 0. The first message on the
socket is the `EngineConfig`, or an `Ask`, which is answered; after the configuration `ToEngine` messages come
in and `FromEngine` messages go out. The process ends with the front end, however that ends.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING

import msgspec

from engine.config import EngineConfig
from engine.errors import EngineError, FaultyModel
from engine.machine import device_name, keep_freed_memory, usable_cores
from engine.messages import (
    Abort,
    Add,
    Answer,
    Ask,
    Cores,
    FromEngine,
    Loaded,
    LoadFailed,
    Opening,
    Output,
    Ping,
    Pong,
    Ready,
    StepDone,
    ToEngine,
)
from processes.inside import Parent

if TYPE_CHECKING:
    from engine.guidance import Built
    from engine.runner import ModelRunner

logger = logging.getLogger("engine.process")

SPIN_COUNT, SPINS = "GOMP_SPINCOUNT", "5000"
"""How long libgomp's threads spin before they sleep: about as long as torch takes between two parallel operations."""

MESSAGES_PER_STEP = 64
"""Greatest number of messages taken between two steps, so that a flood of new requests does not stop the
running ones."""


class Channel:
    """The engine's end of the connection: one reader thread, one writer."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def read_config(self) -> EngineConfig | None:
        """Answer questions until the configuration comes; None if the front end ends before that."""
        while (frame := self._parent.receive()) is not None:
            message = msgspec.msgpack.decode(frame, type=Opening)
            if isinstance(message, EngineConfig):
                return message
            self.send(_answer(message))
        return None

    def send(self, message: FromEngine) -> None:
        self._parent.send(self._encoder.encode(message))

    def messages(self) -> Iterator[ToEngine]:
        """Yield messages until the front end closes the connection."""
        while (frame := self._parent.receive()) is not None:
            yield self._decoder.decode(frame)


def _answer(ask: Ask) -> Answer:
    module, _, name = ask.function.partition(":")
    return Answer(getattr(import_module(module), name)(ask.question))


def serve(channel: Channel, config: EngineConfig) -> None:
    """Load the model, report it, and step until the front end closes the connection."""
    import torch

    from engine.engine import Engine
    from engine.executor import threads_for
    from engine.guidance import Built, GuideBuilder

    torch.set_num_threads(threads_for(config))
    try:
        engine = Engine.load(config)
        keep_freed_memory()
        use_cores(engine.runner, config)
        channel.send(Loaded())
        engine.warm_up()
    except EngineError as error:
        channel.send(LoadFailed(str(error), isinstance(error, FaultyModel)))
        return
    runner = engine.runner
    channel.send(
        Ready(
            max_model_len=runner.max_model_len,
            max_num_seqs=engine.scheduler.max_num_seqs,
            num_blocks=runner.num_blocks,
            block_size=runner.block_size,
            dtype=str(runner.dtype).removeprefix("torch."),
            attention=runner.kernel.name,
            weight_bytes=runner.weight_bytes,
            constrains=engine.guidance is not None,
            device=device_name(config.devices[0]),
            row_size=runner.model.row_size,
        )
    )
    inbox: queue.SimpleQueue[ToEngine | Built | None] = queue.SimpleQueue()
    builder = GuideBuilder(engine.guidance, inbox.put)
    threading.Thread(target=_read_all, args=(channel, inbox), daemon=True, name="reader").start()
    while True:
        refused: list[Output] = []
        changed = False
        for message in _take(inbox, block=not engine.has_work):
            if message is None:
                return
            if isinstance(message, Add):
                if message.grammar is None:
                    refused += engine.add(message)
                else:
                    builder.start(message)
            elif isinstance(message, Built):
                builder.take(message)
                refused += engine.add_built(message)
            elif isinstance(message, Abort):
                changed = True
                builder.abort(message.request_ids)
                for request_id in message.request_ids:
                    engine.abort(request_id)
            elif isinstance(message, Ping):
                channel.send(Pong(message.number, engine.stats()))
            elif isinstance(message, Cores) and config.tensor_parallel_degree == 1:
                use_cores(runner, msgspec.structs.replace(config, cpu_share=message.share))
        outputs = refused + engine.step()
        if outputs or changed:
            channel.send(StepDone(outputs, engine.stats()))


def use_cores(runner: ModelRunner, config: EngineConfig) -> None:
    """Use the configuration's part of the cores from the next step on."""
    import torch

    from engine.executor import threads_for

    threads = threads_for(config, runner.weight_bytes)
    torch.set_num_threads(threads)
    if os.environ.get(SPIN_COUNT) == SPINS:
        runner.threads.count = threads


def _take(inbox: queue.SimpleQueue[ToEngine | Built | None], *, block: bool) -> Iterator[ToEngine | Built | None]:
    """Yield waiting messages, at most MESSAGES_PER_STEP; at least one if `block`."""
    for _ in range(MESSAGES_PER_STEP):
        try:
            yield inbox.get(block=block)
        except queue.Empty:
            return
        block = False


def _read_all(channel: Channel, inbox: queue.SimpleQueue[ToEngine | Built | None]) -> None:
    """Put all messages into the inbox; a final None means that the front end is gone."""
    try:
        for message in channel.messages():
            inbox.put(message)
    except (OSError, msgspec.MsgspecError):
        logger.exception("the connection to the front failed")
    finally:
        inbox.put(None)


def limit_spinning() -> None:
    """Let threads that wait for each other sleep soon on two cores, both of which the engine uses.

    If the front end or another program has taken a core, a thread that spins keeps the one it waits for from running.
    libgomp reads the setting once, when torch is imported.
    """
    if usable_cores() == 2 and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(SPIN_COUNT, SPINS)


def _import_engine() -> None:
    """Import the engine, which takes seconds.

    What is imported stays, so the garbage collector need not search it, now or later: that would take a fifth of the
    time.
    """
    limit_spinning()
    gc.disable()
    import engine.engine  # noqa: F401

    gc.freeze()
    gc.enable()


def main() -> None:
    """Run the engine, or a further rank of it."""
    parent = Parent()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        _import_engine()
        if sys.argv[1] == "--rank":
            from engine.executor import follow

            follow(parent)
        else:
            channel = Channel(parent)
            config = channel.read_config()
            if config is not None:
                serve(channel, config)
    except OSError:
        logger.info("the front is gone", exc_info=True)


if __name__ == "__main__":
    main()
