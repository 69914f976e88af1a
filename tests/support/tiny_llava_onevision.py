"""A Llava-OneVision in the format of llava-hf/llava-onevision-qwen2-7b-ov-hf, scaled down: tiles of 28 pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    SiglipVisionConfig,
)

from tests.support.backend import VLLM
from tests.support.models import VLLM_SIZE, make_tokenizer, text_config
from tests.support.tiny_llava_next import TILE, save_tiny, write_processor

PINPOINTS = [[TILE * rows, TILE * columns] for rows in range(1, 5) for columns in range(1, 5)]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{# Images come first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + content['text'] }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_llava_onevision(path: Path, *, seed: int = 0, most_tiles: int = 5) -> Path:
    """most_tiles: 9 on the hub, where grids go up to 6 x 6."""
    torch.manual_seed(seed)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=TILE,
            patch_size=7, vision_use_head=False,
        ),
        text_config=text_config("qwen2", **(VLLM_SIZE if VLLM else {})),
        image_token_index=259,
        video_token_index=262,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=f"anyres_max_{most_tiles}",
    )  # fmt: skip
    save_tiny(LlavaOnevisionForConditionalGeneration(config), path)
    make_tokenizer(None).save_pretrained(path)
    (path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    processor = LlavaOnevisionImageProcessor(
        size={"height": TILE, "width": TILE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.5, 0.5, 0.5],
    )
    write_processor(
        path,
        processor,
        "LlavaOnevisionProcessor",
        image_token="<image>",
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        video_token="<|system|>",
        vision_aspect_ratio=f"anyres_max_{most_tiles}",
    )
    return path


def inputs(processor: Any, images: list[Image.Image], ids: torch.Tensor) -> dict[str, Any]:
    """Of one prompt: transformers tells the images of a prompt by the nested list."""
    return dict(processor([images], return_tensors="pt"))
