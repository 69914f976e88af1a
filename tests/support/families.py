"""A tiny random model of every family that has images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
