"""What an adapter's `pin` does in vLLM's own process, asked there: in a process of its own, as offline scripts are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.shapes import ROOT, SHAPES
from tests.vllm_live.trained_adapter import train_adapter

SCRIPT = """
import asyncio, json, os, sys
from pathlib import Path
from handlers.build import build_engine
from handlers.pipeline import Pipeline
from handlers.request import ChatPrompt, GenerationRequest, Message, TextPart
from handlers.request import RequestSampling
from properties.configuration import resolve

shapes, adapter = sys.argv[1:]

def pinned(worker):
    manager = worker.model_runner.lora_manager._adapter_manager
    return [sorted(cache.pinned_items) for cache in (manager._registered_adapters, manager._active_adapters)]

async def main():
    options = ["rolling_batch=vllm", "enforce_eager=true", "kv_cache_memory_mb=256", "max_model_len=512",
               "enable_lora=true", "max_loras=1", "max_cpu_loras=2", f"allowed_adapter_path={Path(adapter).parent}"]
    engine = await build_engine(resolve(model=shapes, environ=os.environ, options=options), Path(shapes))()
    backend = Pipeline(engine, 20.0)
    async def said(name):
        prompt = ChatPrompt([Message("user", [TextPart("What is this an image of?")], text_only=True)])
        request = GenerationRequest("r", prompt, RequestSampling(temperature=0, max_tokens=16), adapter=name)
        return "".join([delta.text async for delta in await backend.generate(request)])
    async def seen(*names):
        (told,) = await engine.supervisor.engine.collective_rpc(pinned)
        print("SEEN", json.dumps([told, [await said(name) for name in names]]))
    try:
        await backend.adapters.add("loose", adapter)
        await seen(None, "loose")
        await backend.adapters.add("held", adapter, pin=True)
        await seen("loose", "held")
        await backend.adapters.update("loose", pin=True)
        await seen("loose", "held")
        await backend.adapters.remove("held")
        await seen("loose")
    finally:
        await backend.close()

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_pinned_adapter_is_pinned_in_the_engine_until_it_is_removed(tmp_path: Path) -> None:
    sentence = "a blue square"
    train_adapter(tmp_path / "square", "What is this an image of?", sentence)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(SHAPES), str(tmp_path / "square")],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads(line.removeprefix("SEEN ")) for line in done.stdout.splitlines() if "SEEN" in line]
    # Numbers in the order of loading: the second loading of `loose` is the third of all.
    assert [pins for pins, _ in seen] == [[[], []], [[2], [2]], [[2, 3], [2, 3]], [[3], [3]]]
    (model, loose), *others = (said for _, said in seen)
    assert loose != model
    assert all(said == loose for several in others for said in several)
