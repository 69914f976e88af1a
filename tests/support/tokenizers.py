"""Small tokenizers, trained on a few words."""

from __future__ import annotations

from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>", "[INST]", "<end_of_turn>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def trained(tokenizer: Tokenizer, special: list[str] = SPECIAL, **options: Any) -> Tokenizer:
    corpus = ["what is in this picture? <image> im age start end user assistant | [ ] a b c"] * 3
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False, **options)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def wrapped(backend: Tokenizer, *, add_bos: bool = False) -> PreTrainedTokenizerFast:
    if add_bos:
        bos = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
