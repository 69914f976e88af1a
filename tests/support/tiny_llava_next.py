"""A Llava-Next in the format of llava-hf/llava-v1.6-mistral-7b-hf, scaled down: tiles of 28 pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    PreTrainedModel,
    SiglipVisionConfig,
)

from tests.support.backend import VLLM
from tests.support.models import (
    HUB_NAMES,
    VLLM_SIZE,
    make_tokenizer,
    text_config,
    write_generation_config,
    write_hub_names,
)

TILE = 28
PINPOINTS = [[TILE * rows, TILE * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Of the form of the hub's for Vicuna: images first, lists of parts only, no BOS of its own."""
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ ' ' + content['text'] + '</s>' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
)


def make_llava_next(path: Path, *, tower: str = "clip", text: str = "mistral", seed: int = 0) -> Path:
    torch.manual_seed(seed)
    clip = tower == "clip"
    vision: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": TILE, "patch_size": 7,
    }  # fmt: skip
    strategy = "default" if clip else "full"
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision) if clip else SiglipVisionConfig(**vision),
        text_config=text_config(text, **(VLLM_SIZE if VLLM else {})),
        image_token_index=259,
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
        image_grid_pinpoints=PINPOINTS,
    )
    save_tiny(LlavaNextForConditionalGeneration(config), path)
    make_tokenizer(None).save_pretrained(path)
    template = {"chat_template": MISTRAL if text == "mistral" else VICUNA}
    (path / "chat_template.json").write_text(json.dumps(template))
    write_processor(
        path,
        LlavaNextImageProcessor(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=PINPOINTS,
        ),
        "LlavaNextProcessor",
        patch_size=7,
        image_token="<image>",
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(clip),
    )
    return path


def save_tiny(model: PreTrainedModel, path: Path, hub_names: Sequence[tuple[str, str]] = HUB_NAMES) -> None:
    """Weights of the tower and the projector are so large that images change what is said of them."""
    for name, parameter in model.named_parameters():
        if ("vision_tower" in name or "projector" in name) and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith("image_newline"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(path)
    if VLLM:
        write_hub_names(path / "model.safetensors", hub_names)
    write_generation_config(path)


def write_processor(path: Path, processor: Any, processor_class: str, **settings: Any) -> None:
    """The files of a joint processor, as the hub has them."""
    processor.save_pretrained(path)
    file = path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processor_class": processor_class}))
    (path / "processor_config.json").write_text(json.dumps({"processor_class": processor_class, **settings}))
