"""Families of vision models, tiny and random: both backends give the same words to the same chats."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.likeness import noise
from tests.support.live import LiveServer, message
from tests.support.tiny_gemma import make_gemma3, make_paligemma
from tests.support.tiny_llava_next import make_llava_next
from tests.support.tiny_llava_onevision import make_llava_onevision
from tests.support.tiny_phi3_v import make_phi3_v
from tests.support.tiny_pixtral import make_pixtral

MAKERS: dict[str, Callable[[Path], Path]] = {
    "llava_next": make_llava_next,
    "pixtral": make_pixtral,
    # vLLM knows no other number
    "llava_onevision": lambda path: make_llava_onevision(path, most_tiles=9),
    "mistral3": lambda path: make_pixtral(path, merge=2),
    # vLLM's CPU attention is causal throughout. These models give the same answers either way: an image of a single
    # token sees nothing more, and the keys of a single layer depend on no attention.
    "gemma3": lambda path: make_gemma3(path, tokens=1, initializer_range=0.02),
    "paligemma": lambda path: make_paligemma(path, num_hidden_layers=1, initializer_range=0.02),
    "paligemma2": lambda path: make_paligemma(path, second=True, num_hidden_layers=1, initializer_range=0.02),
    "phi3_v": make_phi3_v,
}
OPTIONS = ("dtype=float32", 'limit_mm_per_prompt={"image": 2}')
OWN = dict.fromkeys(("pixtral", "mistral3"), ("image_placeholder_token=[IMG]",)) | {"phi3_v": ("max_model_len=2048",)}
"""By family: the tiny tokenizer, unlike Pixtral's, also has the token that vLLM writes for a Llava's image; and vLLM's
default is the context with short frequencies."""
TEXT_AND_NEWLINE = (
    "chat_template={% for part in messages[0].content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}\n"
)
"""vLLM itself puts PaliGemma's image and the beginning-of-sequence token before the text."""
THEIRS = dict.fromkeys(("paligemma", "paligemma2"), (TEXT_AND_NEWLINE,)) | {
    # vLLM counts from the end of the published tower's 24 layers, of which this one has the first two
    "phi3_v": (
        "trust_remote_code=true",
        'hf_overrides={"img_processor": {"image_dim_out": 1024, "num_img_tokens": 144, "layer_idx": -24}}',
    ),
}
"""Options with vLLM alone."""
IMAGES_ALONE = {"paligemma", "paligemma2", "phi3_v"}
"""PaliGemma answers no text alone; for Phi-3 Vision vLLM chooses the rotary frequencies of long prompts always."""
FEW = {"llava_onevision", "paligemma", "paligemma2"}
"""vLLM cuts images of Llava-OneVision into tiles also where there are several, unlike transformers, and takes one image
for PaliGemma."""
SIZES = [(56, 56), (30, 90), (200, 40), (9, 9), (150, 140), (64, 33)]


def chats(family: str) -> list[dict[str, Any]]:
    images: list[Image.Image] = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    said = [message("look: ", image) for image in images]
    if family not in IMAGES_ALONE:
        said.append(message("no image at all"))
    if family not in FEW:
        said += [message(images[0], " and ", images[1]), message(images[4], images[2], "?")]
    return [{"messages": [turn], "temperature": 0, "max_tokens": 16, "ignore_eos": True} for turn in said]


def answers(path: Path, backend: str, bodies: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Tokens of the prompt, and the text."""
    own = (*OWN.get(path.name, ()), *(THEIRS.get(path.name, ()) if backend == "vllm" else ()))
    with (
        LiveServer(path, f"rolling_batch={backend}", *OPTIONS, *own) as server,
        ThreadPoolExecutor(16) as pool,
    ):
        replies = list(pool.map(lambda body: server.http.post("/v1/chat/completions", json=body), bodies))
    assert [reply.text for reply in replies if reply.status_code != 200] == []
    found = [reply.json() for reply in replies]
    return [(r["usage"]["prompt_tokens"], r["choices"][0]["message"]["content"]) for r in found]


@pytest.mark.parametrize("family", MAKERS)
def test_both_backends_answer_alike(family: str, tmp_path: Path) -> None:
    path = MAKERS[family](tmp_path / family)
    ours, theirs = (answers(path, backend, chats(family)) for backend in ("rolling", "vllm"))
    assert ours == theirs
