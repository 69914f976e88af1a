"""Embeddings for a model of vLLM's that dies of wrong ones: told at the start. Those that are served are in
tests/live/test_qwen_vl.py."""

from __future__ import annotations

from pathlib import Path

from tests.support.scripts import run_script
from tests.support.tiny_qwen_vl import make_qwen_vl

SCRIPT = """
import asyncio, os, sys
from dataclasses import replace
from pathlib import Path
from handlers.backends.vllm import probes as module
from handlers.build import build_engine
from properties.configuration import resolve

options = ["rolling_batch=vllm", "enforce_eager=true", "kv_cache_memory_mb=256", "enable_mm_embeds=true"]
wanted = module.embeddings_wanted

def wrong(engine):
    right = wanted(engine)
    return replace(right, hidden_size=right.hidden_size * 2)

async def main():
    module.embeddings_wanted = wrong
    start = build_engine(resolve(model=sys.argv[1], environ=os.environ, options=options), Path(sys.argv[1]))
    try:
        await start()
    except Exception as error:
        print("FAILED", type(error).__name__, error)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_model_whose_engine_dies_of_them_does_so_at_the_start(tmp_path: Path) -> None:
    """Here because the front is wrong about it: twice the hidden size, which vLLM does not check for this model."""
    printed = run_script(tmp_path, SCRIPT, make_qwen_vl(tmp_path / "model"))
    assert "FAILED InvalidConfiguration option.enable_mm_embeds: the engine fails" in printed
