"""A model whose weights vLLM reads from a pickle: nothing that is in it is run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from handlers import LLM, SamplingParams
from handlers.errors import InvalidRequest, ServingError
from tests.support.saved_tensors import Planted
from tests.support.shapes import SHAPES

OPTIONS = {
    "rolling_batch": "vllm",
    "enforce_eager": True,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 1 << 27,
}


def test_a_planted_pickle_is_never_run(tmp_path: Path) -> None:
    model, trace = shutil.copytree(SHAPES, tmp_path / "model"), tmp_path / "trace"
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save({**weights, "planted": Planted(trace)}, model / "pytorch_model.bin")
    with pytest.raises(ServingError):
        LLM(str(model), **OPTIONS)
    torch.save(weights, model / "pytorch_model.bin")
    with LLM(str(model), load_format="pt", **OPTIONS) as llm:
        (output,) = llm.generate("USER: Hello\nASSISTANT:", SamplingParams(temperature=0))
        assert output.outputs[0].token_ids
        embeddings = {"prompt": "<image>a", "multi_modal_data": {"image": torch.ones(64, 128)}}
        with pytest.raises(InvalidRequest, match="enable_mm_embeds=True"):
            llm.generate(embeddings)
    assert not trace.exists()
