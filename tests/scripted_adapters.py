"""The vLLM backend's adapters around an engine that only remembers what it was told to load."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, NamedTuple

from handlers.backends.vllm.adapters import VllmAdapters


class Request(NamedTuple):
    lora_name: str
    lora_int_id: int
    lora_path: str


class EngineDead(Exception):
    pass


class Names:
    """What is used of vLLM."""

    LoRARequest = Request
    EngineDeadError = EngineDead


class LoraEngine:
    """loaded: number -> name of what is loaded now. gate: loading waits for it. A directory with a file `rank` is
    refused as vLLM refuses a high one."""

    def __init__(self) -> None:
        self.loaded: dict[int, str] = {}
        self.errored = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()

    async def add_lora(self, request: Request) -> bool:
        self.asked.set()
        await self.gate.wait()
        if os.path.exists(f"{request.lora_path}/rank"):  # noqa: ASYNC240 - a test's
            raise RuntimeError(
                f"Call to add_lora failed:\nLoRA rank 64 of {request.lora_path} is greater than 16"
            )
        self.loaded[request.lora_int_id] = request.lora_name
        return True

    async def remove_lora(self, number: int) -> bool:
        return self.loaded.pop(number, None) is not None


def scripted_adapters(home: Path, most: int, *, allowed: str = "") -> tuple[VllmAdapters, LoraEngine]:
    """None are loaded yet."""
    engine = LoraEngine()
    names: Any = Names()
    return VllmAdapters(names, {}, most, lambda: engine, home=home, allowed=allowed), engine


def make_adapter(directory: Path, *more: str) -> Path:
    """A directory that looks like an adapter. more: further files."""
    directory.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", *more):
        (directory / name).write_text("{}")
    return directory
