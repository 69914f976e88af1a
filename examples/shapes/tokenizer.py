"""The byte-level tokenizer: how it is made, and how conversations become tokens and targets.

Run as a program it writes ``tokenizer.json`` and ``tokenizer_config.json`` beside itself.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from questions import Conversation, converse
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from world import sample_scene

HERE = Path(__file__).resolve().parent
VOCABULARY = 768
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<|system|>", "<|user|>", "<|assistant|>")
PAD, BOS, EOS, IMAGE, SYSTEM, USER, ASSISTANT = range(len(SPECIAL))
ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}

OTHER_TEXT = (
    "The quick brown fox jumps over the lazy dog. It was the best of times, it was the worst of times.",
    "We hold these truths to be self-evident, that all men are created equal.",
    "Once upon a time there was a little house in the middle of a big forest, and nobody knew who had built it.",
    "Please write a short story about a journey. Could you explain how this works? I don't think that is right.",
    "Translate the following sentence into French. Summarize the text below. What is the capital of Germany?",
    '{"model": "shapes", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16, "temperature": 0.0}',
    '{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}, "strict": true, "value": null}',
    "def add(first: int, second: int) -> int:\n    return first + second\n\nfor i in range(10):\n    print(i)\n",
    "import os\nclass Server:\n    def __init__(self, port=8080):\n        self.port = port\n",
    "https://www.example.com/index.html?query=1&page=2 0123456789 10 100 1000 2024 3.14 50% $5",
)


def build(seed: int = 0) -> Tokenizer:
    """Train byte-level BPE on conversations about shapes and a little of everything else."""
    rng = random.Random(seed)

    def texts() -> Iterator[str]:
        for _ in range(6000):
            scenes = [sample_scene(rng) for _ in range(rng.randint(0, 3))]
            for message in converse(scenes, 4, rng).messages:
                content = message["content"]
                yield content if isinstance(content, str) else " ".join(p.get("text", "") for p in content)
        for _ in range(60):
            yield from OTHER_TEXT

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's two files into ``folder``."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "image_token": "<image>",
        "additional_special_tokens": ["<image>", "<|system|>", "<|user|>", "<|assistant|>"],
        "added_tokens_decoder": {
            str(i): {"content": token, "special": True, "normalized": False}
            | {"lstrip": False, "rstrip": False, "single_word": False}
            for i, token in enumerate(SPECIAL)
        },
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


@lru_cache(maxsize=1)
def load(folder: Path = HERE) -> Tokenizer:
    """Read the tokenizer that lies beside this file."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@lru_cache(maxsize=50_000)
def encode(text: str) -> tuple[int, ...]:
    """Return the token ids of a text between two special tokens."""
    return tuple(load().encode(text, add_special_tokens=False).ids)


def tokens(conversation: Conversation, image_tokens: int) -> tuple[list[int], list[int]]:
    """Return a conversation's token ids, every picture as ``image_tokens`` ids, and the targets beside them.

    The target at a position is the id that should follow it where an assistant speaks, and -100 elsewhere.
    The ids are those that the chat template and the processor give for the same conversation.
    """
    if conversation.prompt is not None:
        written = load().encode(conversation.prompt, add_special_tokens=False).ids
        asked = [t for token in written for t in ([token] * image_tokens if token == IMAGE else [token])]
        told = [*encode(conversation.messages[-1]["content"]), EOS]
        return asked + told, [-100] * (len(asked) - 1) + told + [-100]
    ids: list[int] = [BOS]
    targets: list[int] = [-100]

    def put(more: tuple[int, ...], learn: bool = False) -> None:
        if learn:
            targets[-1] = more[0]
            targets.extend(more[1:])
        else:
            targets.extend([-100] * (len(more) - 1))
        targets.append(-100)
        ids.extend(more)

    for message in conversation.messages:
        put((ROLES[message["role"]],))
        content: Any = message["content"]
        if message["role"] == "assistant":
            put((*encode(content), EOS), learn=True)
            continue
        # Neighbouring text parts meet without a seam, as the template writes them.
        text = ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                text += part["text"]
                continue
            if text:
                put(encode(text))
            put((IMAGE,) * image_tokens)
            text = ""
        put((*encode(text), EOS))
    return ids, targets


def main() -> None:
    """Make the tokenizer and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE)
    save(build(), parser.parse_args().out)


if __name__ == "__main__":
    main()
