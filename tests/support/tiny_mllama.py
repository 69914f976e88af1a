"""A small random Llama 3.2 Vision in the hub's format, scaled down from the 11B model's published configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessorPil,
)

from tests.support.models import VOCAB, make_tokenizer, write_generation_config

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)


def make_mllama(path: Path, *, seed: int = 0, **text: Any) -> Path:
    """28-pixel tiles of 16 patches and a class token, up to four of them; every third layer attends to images.

    As in the published model the image token's id lies behind the vocabulary of the logits.
    """
    torch.manual_seed(seed)
    config = MllamaConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 3, "num_global_layers": 2, "attention_heads": 2,
            "intermediate_size": 48, "image_size": 28, "patch_size": 7, "max_num_tiles": 4,
            "intermediate_layers_indices": [0, 2], "vision_output_dim": 96,
        },
        text_config={
            "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5,
            "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1, 3],
            "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
            **text,
        },
        image_token_index=VOCAB,
    )  # fmt: skip
    model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "gate" in name and parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    fillers = [f"<|reserved_{number}|>" for number in range(VOCAB - len(tokenizer))]
    tokenizer.add_tokens([*fillers, "<|image|>"], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids("<|image|>") == VOCAB
    tokenizer.save_pretrained(path)
    MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=4).save_pretrained(path)
    write_generation_config(path)
    return path


def inputs(processor: Any, images: list[Image.Image], ids: torch.Tensor) -> dict[str, Any]:
    """As transformers' joint processor makes them, which finds the image tokens in the ids."""
    from transformers.models.mllama.processing_mllama import (
        convert_sparse_cross_attention_mask_to_dense,
        get_cross_attention_token_mask,
    )

    out = dict(processor([images], return_tensors="pt"))
    spans = get_cross_attention_token_mask(ids[0].tolist(), VOCAB)
    mask = convert_sparse_cross_attention_mask_to_dense([spans], out.pop("num_tiles"), 4, ids.shape[1])
    return {**out, "cross_attention_mask": torch.from_numpy(mask)}
