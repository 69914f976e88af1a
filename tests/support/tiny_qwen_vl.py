"""Tiny random Qwen2-VL, Qwen2.5-VL and Qwen3-VL models, with files of the form that the hub's have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)

from tests.support.models import VOCAB, make_tokenizer

TEMPLATE = (
    "{% set images = namespace(seen=0) %}{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' or 'image' in part or 'image_url' in part %}"
    "{% set images.seen = images.seen + 1 %}{% if add_vision_id %}Picture {{ images.seen }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
START, END, IMAGE, VIDEO = 266, 267, 268, 269
"""Ids of the last four."""

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
HIDDEN = 128
"""vLLM's attention on a CPU wants heads of 32 and more."""

_SECTIONS = {"qwen2_vl": [4, 6, 6], "qwen2_5_vl": [4, 6, 6], "qwen3_vl": [6, 5, 5]}
_VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 64, "hidden_size": HIDDEN, "mlp_ratio": 2, "patch_size": 14, "depth": 2},
    "qwen2_5_vl": {
        "hidden_size": 64, "out_hidden_size": HIDDEN, "intermediate_size": 96, "patch_size": 14, "depth": 4,
        "window_size": 56, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2,
    },
    "qwen3_vl": {
        "hidden_size": 64, "out_hidden_size": HIDDEN, "intermediate_size": 96, "patch_size": 16, "depth": 4,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2],
    },
}  # fmt: skip
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def make_qwen_vl(path: Path, kind: str = "qwen2_vl", *, most_tokens: int = 24, seed: int = 3) -> Path:
    """most_tokens: of an image, unless it is very long."""
    torch.manual_seed(seed)
    config_class: Any = type(AutoConfig.for_model(kind))
    tokenizer = make_tokenizer(TEMPLATE)
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    assert tokenizer.convert_tokens_to_ids(list(MARKS[2:])) == [START, END, IMAGE, VIDEO]
    config = config_class(
        text_config={
            "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 192, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "head_dim": 32,
            "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "initializer_range": 0.2,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10000.0, "mrope_section": _SECTIONS[kind],
            },
        },
        vision_config={"num_heads": 2, "spatial_merge_size": 2, "initializer_range": 0.3, **_VISION[kind]},
        vision_start_token_id=START, vision_end_token_id=END, image_token_id=IMAGE, video_token_id=VIDEO,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config)
    for name, parameter in model.named_parameters():
        if "visual" in name and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    _write_config_of_the_hub(path / "config.json", kind)
    _write_processor_files(path, tokenizer, kind, most_tokens)
    return path


def _write_config_of_the_hub(path: Path, kind: str) -> None:
    """Rotary settings by their old name; for the older two, the decoder's fields beside the model's own."""
    config = json.loads(path.read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    if kind == "qwen3_vl":
        text["rope_scaling"] = {"mrope_interleaved": True, **rope}
        config["text_config"] = text
    else:
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        config = {**text, **config}
    path.write_text(json.dumps(config))


def _write_processor_files(path: Path, tokenizer: PreTrainedTokenizerFast, kind: str, most_tokens: int) -> None:
    tokenizer.save_pretrained(path)
    patch = _VISION[kind]["patch_size"]
    token = (2 * patch) ** 2
    shared = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    if kind == "qwen3_vl":
        settings: dict[str, Any] = {
            "size": {"longest_edge": most_tokens * token, "shortest_edge": 4 * token}, **shared,
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
            "processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast",
        }  # fmt: skip
    else:
        settings = {
            "min_pixels": 4 * token, "max_pixels": most_tokens * token, **shared,
            "image_mean": _MEAN, "image_std": _STD, "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor" if kind == "qwen2_vl" else "Qwen2_5_VLProcessor",
        }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 256, "eos_token_id": [257, 263], "pad_token_id": 258})
    )


def inputs(processor: Any, images: list[Image.Image], ids: torch.Tensor) -> dict[str, Any]:
    return {**processor(images, return_tensors="pt"), "mm_token_type_ids": (ids == IMAGE).int()}
