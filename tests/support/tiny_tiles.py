"""Tiny random Idefics3, SmolVLM and InternVL models in the hub's format: published configs, scaled down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
)

from tests.support.backend import VLLM
from tests.support.models import VLLM_SIZE, make_tokenizer, text_config

TILE, PATCH = 28, 7
ROWS = 4
"""Of the encoder for each tile: 4 x 4 patches, merged 2 by 2."""

NEWLINES = ("Ċ", "Ċ")
"""Two of them are one token, as in the tokenizers of the hub's models."""

IDEFICS3_TOKENS = (
    "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)  # fmt: skip
IDEFICS3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
INTERNVL_TOKENS = ("<IMG_CONTEXT>", "<img>", "</img>", "<video>")
INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_idefics3(path: Path, kind: str = "idefics3", *, seed: int = 0, **processor: Any) -> Path:
    """kind: or "smolvlm". Images are up to 4 x 4 tiles and the global one."""
    torch.manual_seed(seed)
    smol = kind == "smolvlm"
    config = (SmolVLMConfig if smol else Idefics3Config)(
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": TILE, "patch_size": PATCH,
        },
        text_config=text_config("llama", max_position_embeddings=1024, **_size()).to_dict(),
        scale_factor=2, image_token_id=259, pad_token_id=258, tie_word_embeddings=False,
    )  # fmt: skip
    model = (SmolVLMForConditionalGeneration if smol else Idefics3ForConditionalGeneration)(config)
    _save(model, path, ("vision_model", "connector"))
    make_tokenizer(IDEFICS3_TEMPLATE, more=IDEFICS3_TOKENS, merges=[NEWLINES]).save_pretrained(path)
    settings = {"size": {"longest_edge": 4 * TILE}, "max_image_size": {"longest_edge": TILE}, **processor}
    (SmolVLMImageProcessor if smol else Idefics3ImageProcessor)(**settings).save_pretrained(path)
    name = "SmolVLMProcessor" if smol else "Idefics3Processor"
    _write_processor(path, {"processor_class": name, "image_seq_len": ROWS})
    return path


def make_internvl(path: Path, text: str = "qwen2", *, seed: int = 0) -> Path:
    """Images are up to 6 tiles and the thumbnail."""
    torch.manual_seed(seed)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": [TILE, TILE], "patch_size": [PATCH, PATCH], "attention_bias": True,
        },
        text_config=text_config(text, max_position_embeddings=1024, **_size()).to_dict(),
        image_token_id=264, image_seq_length=ROWS, tie_word_embeddings=False,
    )  # fmt: skip
    _save(InternVLForConditionalGeneration(config), path, ("vision_tower", "projector"))
    tokenizer = make_tokenizer(INTERNVL_TEMPLATE, more=INTERNVL_TOKENS, merges=[NEWLINES])
    context, start, end, video = INTERNVL_TOKENS
    tokenizer.save_pretrained(path)
    settings = path / "tokenizer_config.json"
    named = {
        "context_image_token": context, "start_image_token": start, "end_image_token": end, "video_token": video,
    }  # fmt: skip
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"extra_special_tokens": named}))
    GotOcr2ImageProcessor(
        size={"height": TILE, "width": TILE}, crop_to_patches=False, min_patches=1, max_patches=6
    ).save_pretrained(path)
    _write_processor(path, {"processor_class": "InternVLProcessor", "image_seq_length": ROWS})
    return path


def _size() -> dict[str, int]:
    return VLLM_SIZE if VLLM else {}


def _save(model: PreTrainedModel, path: Path, vision: tuple[str, ...]) -> None:
    """With weights so large that the images decide the answers."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in vision) and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    GenerationConfig(bos_token_id=256, eos_token_id=[257, 263], pad_token_id=258).save_pretrained(path)


def _write_processor(path: Path, settings: dict[str, Any]) -> None:
    (path / "processor_config.json").write_text(json.dumps(settings))
    preprocessor = path / "preprocessor_config.json"
    known = json.loads(preprocessor.read_text()) | {"processor_class": settings["processor_class"]}
    preprocessor.write_text(json.dumps(known))


def inputs(processor: Any, images: list[Image.Image], _: Any) -> dict[str, Any]:
    return {"pixel_values": processor(images, crop_to_patches=True, return_tensors="pt")["pixel_values"]}
