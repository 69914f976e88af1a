"""Small random Gemma 3, PaliGemma and PaliGemma 2 in the hub's format, scaled down from the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from tests.support.backend import VLLM
from tests.support.models import (
    VLLM_SIZE,
    make_tokenizer,
    text_config,
    write_generation_config,
    write_hub_names,
)

VISION = SiglipVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7,
    vision_use_head=False,
)  # fmt: skip
SIZE = {"height": 28, "width": 28}
_SIZE = VLLM_SIZE | {"head_dim": 32} if VLLM else {}
START, SOFT, END = 264, 265, 266
NEWLINES = ["\n" * count for count in range(1, 5)]

GEMMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_gemma3(path: Path, *, seed: int = 0, tokens: int = 4, newlines: bool = VLLM, **text: Any) -> Path:
    """28-pixel images of 16 patches, pooled to `tokens`; a layer with a window and one without.

    newlines: whether line breaks are tokens, as in Gemma's vocabulary, without which vLLM does not start.
    """
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text_config("gemma3_text", **{"sliding_window": 9, **_SIZE, **text}).to_dict(),
            vision_config=VISION.to_dict(),
            mm_tokens_per_image=tokens,
            image_token_index=SOFT,
            boi_token_index=START,
            eoi_token_index=END,
        )
    )
    _save(model, path)
    tokenizer = make_tokenizer(GEMMA3_TEMPLATE)
    names = ["<start_of_image>", "<image_soft_token>", "<end_of_image>"]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    assert tokenizer.convert_tokens_to_ids(names) == [START, SOFT, END]
    if newlines:
        tokenizer.add_tokens(NEWLINES)
    tokenizer.save_pretrained(path)
    file = path / "tokenizer_config.json"
    named = dict(zip(("boi_token", "image_token", "eoi_token"), names, strict=True))
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    Gemma3ImageProcessorPil(size=SIZE, image_seq_length=tokens).save_pretrained(path)
    joined = {"processor_class": "Gemma3Processor", "image_seq_length": tokens}
    (path / "processor_config.json").write_text(json.dumps(joined))
    return path


def make_paligemma(path: Path, *, second: bool = False, seed: int = 0, newlines: bool = VLLM, **text: Any) -> Path:
    """28-pixel images of 16 tokens. second: PaliGemma 2, with Gemma 2's window and caps. No chat template."""
    torch.manual_seed(seed)
    decoder = text_config("gemma2" if second else "gemma", **_SIZE, **text)
    model = PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            text_config=decoder.to_dict(),
            vision_config=VISION.to_dict(),
            projection_dim=decoder.hidden_size,
            hidden_size=decoder.hidden_size,
            image_token_index=259,
        )
    )
    _save(model, path)
    tokenizer = make_tokenizer(None)
    if newlines:
        tokenizer.add_tokens(NEWLINES)
    tokenizer.save_pretrained(path)
    processor = SiglipImageProcessor(size=SIZE)
    processor.save_pretrained(path)
    file = path / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | {
        "image_seq_length": 16,
        "processor_class": "PaliGemmaProcessor",
    }
    file.write_text(json.dumps(settings))
    return path


def _save(model: PreTrainedModel, path: Path) -> None:
    """Random weights of a size that makes answers depend on the image."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed_tokens" not in name and "lm_head" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    if VLLM:
        write_hub_names(path / "model.safetensors")
    write_generation_config(path)


def inputs(processor: Any, images: list[Image.Image], ids: torch.Tensor) -> dict[str, Any]:
    """token_type_ids: Gemma 3 wants to know which tokens are images, PaliGemma which are the prompt's."""
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "token_type_ids": (ids == SOFT).long()}
