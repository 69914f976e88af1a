"""An engine without a model: every step takes the same time and gives each running request one token.

It speaks the embedded engine's messages, so that a server on top of it costs what it costs on top of a fast engine.
`bench/stub/sitecustomize.py` starts it in place of the engine's process.
"""

from __future__ import annotations

import os
import queue
import threading
import time

from engine.config import EngineConfig
from engine.messages import Abort, Add, Output, Ping, Pong, Ready, Stats, StepDone, ToEngine
from engine.process import Channel
from processes.inside import Parent

STEP_MS = "PYTHON_STUB_STEP_MS"
"""The variable with the milliseconds of a step; an engine's process is given those whose names begin with PYTHON."""


def serve(channel: Channel, config: EngineConfig, step: float) -> None:
    """Answer requests until the front end closes the connection. step: its seconds."""
    channel.send(
        Ready(
            max_model_len=config.max_model_len or 4096,
            max_num_seqs=config.max_num_seqs,
            num_blocks=2**20,
            block_size=16,
            dtype="float32",
            attention="stub",
            weight_bytes=0,
        )
    )
    inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(channel, inbox), daemon=True).start()
    left: dict[int, int] = {}  # tokens that each request still gets, the oldest first
    assert config.vocabulary is not None
    words = config.vocabulary.tokens // 4  # the second quarter of them: neither special nor single bytes
    steps, due = 0, time.monotonic()
    while True:
        while not left or due > time.monotonic():
            try:
                message = inbox.get(timeout=max(0.0, due - time.monotonic()) if left else None)
            except queue.Empty:
                break
            if message is None:
                return
            if isinstance(message, Add):
                if not left:
                    due = time.monotonic() + step
                left.update(dict.fromkeys(message.choice_ids, message.params.max_tokens or 16))
            elif isinstance(message, Abort):
                for request_id in message.request_ids:
                    left.pop(request_id, None)
            elif isinstance(message, Ping):
                channel.send(Pong(message.number, Stats(steps=steps)))
        due = max(due, time.monotonic() - step / 2) + step  # half a step remains for messages, however late
        steps += 1
        outputs = []
        for request_id in list(left)[: config.max_num_seqs]:
            left[request_id] -= 1
            token = words + (request_id + steps) % words
            ended = not left[request_id]
            outputs.append(Output(request_id, [token], "length" if ended else None))
            if ended:
                del left[request_id]
        running = min(len(left), config.max_num_seqs)
        channel.send(StepDone(outputs, Stats(running=running, waiting=len(left) - running, steps=steps)))


def _read(channel: Channel, inbox: queue.SimpleQueue[ToEngine | None]) -> None:
    for message in channel.messages():
        inbox.put(message)
    inbox.put(None)


def main() -> None:
    channel = Channel(Parent())
    config = channel.read_config()
    if config is not None:
        serve(channel, config, float(os.environ[STEP_MS]) / 1000)


if __name__ == "__main__":
    main()
