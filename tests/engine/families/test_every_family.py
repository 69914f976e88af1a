"""What holds for every family, one test for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.loader import load_preprocessor
from engine.messages import TensorData
from engine.sampling_params import SamplingParams
from tests.support.checked import CPU, report
from tests.support.engine_driver import Prompt, load_engine, run_all
from tests.support.exactness import image_of
from tests.support.families import MAKERS

FAR = 0.2
"""Root mean square error, relative to the log probabilities' standard deviation.

A value with 8 significant bits is off by up to 0.4 %, and some thirty roundings follow one another in these models: 1
to 6 % were measured. Values that have nothing to do with each other are off by 140 %.
"""


def logprobs(path: Path, dtype: str) -> torch.Tensor:
    """Log probabilities of a prompt's tokens, the image's too, and of the answer's first."""
    prompt = Prompt([image_of(60, 40), *range(65, 105)])
    add = prompt.add(load_preprocessor(str(path)), SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))
    (output,) = run_all(load_engine(path, dtype=dtype, max_num_seqs=1), [add])[0].outputs
    assert output.prompt_logprobs is not None
    return torch.tensor([entry.logprobs[0] for entry in output.prompt_logprobs])


@pytest.fixture(params=MAKERS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return MAKERS[request.param](tmp_path / "model")


def test_bfloat16_is_close_to_float32(path: Path) -> None:
    """As it is served by default, beside itself in float32."""
    exact, rounded = logprobs(path, "float32"), logprobs(path, "bfloat16")
    assert rounded.isfinite().all()
    error = (rounded - exact).square().mean().sqrt() / exact.std()
    assert error < FAR


def test_an_image_whose_encoder_fails_fails_its_request_alone(path: Path) -> None:
    preprocessor = load_preprocessor(str(path))
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    prompts = [Prompt([image_of(60, 40, seed), 65, 66]) for seed in range(3)]
    adds = [prompt.add(preprocessor, greedy) for prompt in prompts]
    (want, *_) = run_all(load_engine(path), [adds[0]]).values()
    tensors = adds[1].images[0].tensors
    name = max(tensors, key=lambda name: tensors[name].unpack().size)
    tensors[name] = TensorData.pack(tensors[name].unpack().ravel()[:-1])
    engine = load_engine(path)
    results = run_all(engine, adds)
    assert [results[number].finish for number in range(3)] == ["length", "error", "length"]
    assert results[1].outputs[-1].error == "an image of this request could not be encoded"
    assert results[0].token_ids == want.token_ids


def test_lmi_check_says_what_the_engine_takes(path: Path) -> None:
    found, engine = report(path, CPU, "dtype=fp32"), load_engine(path, max_num_seqs=1)
    shape = engine.runner.kernel.shape
    assert found["errors"] == []
    assert found["memory"]["cache_bytes_per_token"] == shape.bytes_per_block // shape.block_size
    preprocessor = load_preprocessor(str(path))
    assert preprocessor is not None
    shown = preprocessor.prepare(image_of(336, 336), preprocessor.variant(1))
    assert found["prompts"]["image_tokens"]["336x336"] == len(shown.token_ids)
    assert found["prompts"]["template"]
