"""The vLLM backend's adapters around an engine that only remembers what it was told to load."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from handlers.backends.adapters import AdapterFiles
from handlers.backends.vllm.adapters import VllmAdapters
from properties.secure_mode import OPEN, SecureMode


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
    """loaded: number -> name of what is loaded now; pinned: those that are. gate: loading waits for it, and pinning
    for another. A directory with a file `rank` is refused as vLLM refuses a high one. places: on the device."""

    def __init__(self, places: int = 1) -> None:
        self.loaded: dict[int, str] = {}
        self.pinned: set[int] = set()
        self.vllm_config = SimpleNamespace(lora_config=SimpleNamespace(max_loras=places))
        self.pinning = asyncio.Event()
        self.pinning.set()
        self.pin_asked = asyncio.Event()
        self.removed = asyncio.Event()
        self.errored = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked = asyncio.Event()

    async def add_lora(self, request: Request) -> bool:
        self.asked.set()
        await self.gate.wait()
        if os.path.exists(f"{request.lora_path}/rank"):  # noqa: ASYNC240 - a test's
            raise RuntimeError(f"Call to add_lora failed:\nLoRA rank 64 of {request.lora_path} is greater than 16")
        self.loaded[request.lora_int_id] = request.lora_name
        return True

    async def pin_lora(self, number: int) -> bool:
        self.pin_asked.set()
        await self.pinning.wait()
        if self.loaded[number].startswith("slippery"):
            raise RuntimeError("Pinning failed")
        self.pinned.add(number)
        return True

    async def remove_lora(self, number: int) -> bool:
        self.pinned.discard(number)
        self.removed.set()
        return self.loaded.pop(number, None) is not None


def scripted_adapters(
    home: Path, most: int, *, allowed: str = "", places: int = 1, secure: SecureMode = OPEN
) -> tuple[VllmAdapters, LoraEngine]:
    """None are loaded yet."""
    engine = LoraEngine(places)
    names: Any = Names()
    return VllmAdapters(names, AdapterFiles(home, allowed, secure), {}, most, lambda: engine), engine


def make_adapter(directory: Path, *more: str) -> Path:
    """A directory that looks like an adapter. more: further files."""
    directory.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", *more):
        (directory / name).write_text("{}")
    return directory
