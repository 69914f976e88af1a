"""A small random Fuyu in the hub's format, scaled down from the 8B model's published configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import (
    FuyuConfig,
    FuyuForCausalLM,
    FuyuImageProcessorPil,
    FuyuProcessor,
    PreTrainedTokenizerFast,
)

from tests.support.models import VOCAB, write_generation_config

SPEAKER, NEWLINE, ANSWER, BOS = 264, 265, 266, 256


def make_tokenizer() -> PreTrainedTokenizerFast:
    """As the published one, it puts a "▁" before every text, and knows the image's tokens as words like any other."""
    words = [*(chr(number) for number in range(33, 127)), "▁", "<unk>"]
    words += [f"<fill{number}>" for number in range(BOS - len(words))]
    names = ["<s>", "</s>", "<pad>", "<a>", "<b>", "<c>", "<d>", "<e>"]
    words += [*names, "|SPEAKER|", "|NEWLINE|", "<0x04>"]
    backend = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=words.index("<unk>")))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    wanted = ["<s>", "|SPEAKER|", "|NEWLINE|", "<0x04>"]
    assert tokenizer.convert_tokens_to_ids(wanted) == [BOS, SPEAKER, NEWLINE, ANSWER]
    return tokenizer


def make_fuyu(path: Path, *, seed: int = 0) -> Path:
    """Images up to 60 x 80 (height x width) in patches of 10 x 10: at most 54 tokens."""
    torch.manual_seed(seed)
    text = {
        "model_type": "persimmon", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512, "qk_layernorm": True,
        "bos_token_id": BOS, "eos_token_id": 257, "pad_token_id": 258,
        "rope_parameters": {"rope_type": "default", "rope_theta": 25000.0, "partial_rotary_factor": 0.5},
    }  # fmt: skip
    shared = {name: value for name, value in text.items() if name not in ("model_type", "rope_parameters")}
    config = FuyuConfig(text_config=text, patch_size=10, image_size=30, image_token_id=SPEAKER, **shared)
    model = FuyuForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    FuyuImageProcessorPil(size={"height": 60, "width": 80}, patch_size={"height": 10, "width": 10}).save_pretrained(
        path
    )
    write_generation_config(path)
    return path


def patches_of(processor: Any, images: list[Image.Image], ids: torch.Tensor) -> dict[str, Any]:
    """As transformers' joint processor cuts them."""
    both = FuyuProcessor(processor, make_tokenizer())
    patches = [both(text="a", images=[image])["image_patches"].reshape(-1, 300) for image in images]
    return {"image_patches": torch.cat(patches)[None]}
