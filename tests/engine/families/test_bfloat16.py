"""Every family in bfloat16, as it is served by default, beside itself in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.loader import load_preprocessor
from engine.sampling_params import SamplingParams
from tests.support.engine_driver import Prompt, load_engine, run_all
from tests.support.exactness import image_of
from tests.support.models import make_llava
from tests.support.tiny_chameleon import make_chameleon
from tests.support.tiny_fuyu import make_fuyu
from tests.support.tiny_gemma import make_gemma3, make_paligemma
from tests.support.tiny_llava_next import make_llava_next
from tests.support.tiny_llava_onevision import make_llava_onevision
from tests.support.tiny_mllama import make_mllama
from tests.support.tiny_phi3_v import make_phi3_v
from tests.support.tiny_pixtral import make_pixtral
from tests.support.tiny_qwen_vl import make_qwen_vl
from tests.support.tiny_tiles import make_idefics3, make_internvl

MAKERS: dict[str, Callable[[Path], Path]] = {
    "llava": make_llava,
    "chameleon": make_chameleon,
    "fuyu": make_fuyu,
    "gemma3": make_gemma3,
    "idefics3": make_idefics3,
    "internvl": make_internvl,
    "llava_next": make_llava_next,
    "llava_onevision": make_llava_onevision,
    "mistral3": lambda path: make_pixtral(path, merge=2),
    "mllama": make_mllama,
    "paligemma": make_paligemma,
    "paligemma2": lambda path: make_paligemma(path, second=True),
    "phi3_v": make_phi3_v,
    "pixtral": make_pixtral,
    "qwen2_vl": make_qwen_vl,
    "qwen2_5_vl": lambda path: make_qwen_vl(path, "qwen2_5_vl"),
    "qwen3_vl": lambda path: make_qwen_vl(path, "qwen3_vl"),
    "smolvlm": lambda path: make_idefics3(path, "smolvlm"),
}


FAR = 0.2
"""Root mean square error, relative to the log probabilities' standard deviation.

A value with 8 significant bits is off by up to 0.4 %, and some thirty roundings follow one another in these models: 1
to 6 % were measured. Values that have nothing to do with each other are off by 140 %.
"""


def logprobs(path: Path, dtype: str) -> torch.Tensor:
    """Log probabilities of a prompt's tokens, the image's too, and of the answer's first."""
    prompt = Prompt([image_of(60, 40), *range(65, 105)])
    add = prompt.add(
        load_preprocessor(str(path)), SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    )
    (output,) = run_all(load_engine(path, dtype=dtype, max_num_seqs=1), [add])[0].outputs
    assert output.prompt_logprobs is not None
    return torch.tensor([entry.logprobs[0] for entry in output.prompt_logprobs])


@pytest.mark.parametrize("family", MAKERS)
def test_bfloat16_is_close_to_float32(family: str, tmp_path: Path) -> None:
    path = MAKERS[family](tmp_path / "model")
    exact, rounded = logprobs(path, "float32"), logprobs(path, "bfloat16")
    assert rounded.isfinite().all()
    error = (rounded - exact).square().mean().sqrt() / exact.std()
    assert error < FAR
