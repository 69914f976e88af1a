"""Models with a Pixtral tower in the formats of mistral-community/pixtral-12b and mistralai/Mistral-Small-3.1-24B,
scaled down: images of at most 64 pixels in tokens of 8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralVisionConfig,
)

from tests.support.backend import VLLM
from tests.support.models import HUB_NAMES, VLLM_SIZE, make_tokenizer, text_config
from tests.support.tiny_llava_next import save_tiny, write_processor

LONGEST, UNIT = 64, 8
IMG, IMG_BREAK, IMG_END = range(264, 267)
HUB_NAMES_OF_PIXTRAL = [(ours, hub.replace("vision_model.", "")) for ours, hub in HUB_NAMES]
"""Its tower has no `vision_model` inside."""
TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set messages = messages[1:] %}{%- endif %}{{- bos_token }}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system is defined %}{{- '[INST]' + system + '\\n\\n' }}{%- else %}{{- '[INST]' }}{%- endif %}"
    "{%- if message['content'] is not string %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'text' %}{{- part['text'] }}{%- else %}{{- '[IMG]' }}{%- endif %}"
    "{%- endfor %}{%- else %}{{- message['content'] }}{%- endif %}{{- '[/INST]' }}"
    "{%- else %}{{- message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
"""Of the form of the hub's."""


def make_pixtral(path: Path, *, merge: int = 1, seed: int = 0) -> Path:
    """merge: features along each edge of the square that Mistral 3 makes one; 1 makes a Llava."""
    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        "vision_config": PixtralVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=LONGEST,
            patch_size=UNIT // merge,
        ),
        # heads of another size than the hidden one would have them
        "text_config": text_config("mistral", sliding_window=None, head_dim=32, **(VLLM_SIZE if VLLM else {})),
        "image_token_index": IMG,
        "vision_feature_layer": -1,
    }  # fmt: skip
    model = (
        LlavaForConditionalGeneration(LlavaConfig(vision_feature_select_strategy="full", **parts))
        if merge == 1
        else Mistral3ForConditionalGeneration(
            Mistral3Config(spatial_merge_size=merge, tie_word_embeddings=False, **parts)
        )
    )
    save_tiny(model, path, HUB_NAMES_OF_PIXTRAL)
    tokenizer = make_tokenizer(TEMPLATE)
    special = [AddedToken(token, special=True, normalized=False) for token in ("[IMG]", "[IMG_BREAK]", "[IMG_END]")]
    tokenizer.backend_tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(path)
    processor = PixtralImageProcessor(size={"longest_edge": LONGEST}, patch_size=UNIT // merge)
    write_processor(
        path,
        processor,
        "PixtralProcessor",
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
        patch_size=UNIT // merge,
        spatial_merge_size=merge,
    )
    return path


def inputs(processor: Any, images: list[Image.Image], ids: torch.Tensor) -> dict[str, Any]:
    return dict(processor(images, patch_size=UNIT, return_tensors="pt"))
