"""A small random Chameleon in the hub's format, scaled down from the 7B model's published configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonImageProcessorPil

from tests.support.models import VOCAB, make_tokenizer, write_generation_config

CODES = 32
START, END, SEPARATOR, FIRST_WORD = 264, 265, 266, 267


def make_chameleon(path: Path, *, seed: int = 0, **text: Any) -> Path:
    """32-pixel images, each of 16 codes out of 32. swin_norm=True has the 34B model's order of norms."""
    torch.manual_seed(seed)
    # a code's name is its number with letters for digits, as published
    names = ["IMGIMG" + "".join(chr(ord("A") + int(d)) for d in str(code)) + "Z" for code in range(CODES)]
    added = ["<racm3:break>", "<eoss>", "<reserved08706>", *names]
    tokenizer = make_tokenizer(None)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in added])
    tokenizer.sep_token = "<reserved08706>"
    words = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<image>", *added)}
    assert (words["<racm3:break>"], words["<reserved08706>"], words[names[0]]) == (
        START,
        SEPARATOR,
        FIRST_WORD,
    )
    config = ChameleonConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=256, eos_token_id=257, pad_token_id=258,
        vocabulary_map=words,
        vq_config={
            "embed_dim": 16, "num_embeddings": CODES, "latent_channels": 16, "resolution": 32, "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1,
        },
        **text,
    )  # fmt: skip
    model = ChameleonForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "quantize" in name else 0.2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    size = {"height": 32, "width": 32}
    ChameleonImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(path)
    write_generation_config(path)
    return path
