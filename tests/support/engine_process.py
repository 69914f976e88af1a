"""An engine in a process of its own, asked through its client."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from engine.config import EngineConfig
from engine.messages import Add, Output
from handlers.backends.rolling.engine_client import EngineClient, EngineProcess, OutputStream


def config(path: Path, **settings: object) -> EngineConfig:
    defaults = {"dtype": "float32", "kv_cache_bytes": 4 << 20, "threads": 1}
    return EngineConfig(model_path=str(path), **{**defaults, **settings})  # type: ignore[arg-type]


async def started(config: EngineConfig) -> EngineClient:
    return await (await EngineProcess.spawn()).load(config)


@asynccontextmanager
async def running(config: EngineConfig) -> AsyncIterator[EngineClient]:
    client = await started(config)
    try:
        yield client
    finally:
        await client.stop()


async def finish(stream: OutputStream) -> list[Output]:
    outputs: list[Output] = []
    while not outputs or outputs[-1].finish is None:
        outputs += await stream.get()
    return outputs


async def answer(client: EngineClient, add: Add) -> list[int]:
    return [token for output in await finish(client.submit(add)) for token in output.token_ids]
