"""Mistral's tekken.json as the tokenizer's files of the Hugging Face format.

The format, and which ids tokens have, are those of mistral_common's tokens/tokenizers/tekken.py.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import msgspec

from handlers.artefacts.error import ArtefactError

_BEFORE_LISTS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""Special tokens, in the order of their ids, of files that do not list theirs."""


class _Special(msgspec.Struct):
    rank: int
    token_str: str


class _Token(msgspec.Struct):
    token_bytes: str


class _Config(msgspec.Struct):
    pattern: str
    default_vocab_size: int
    default_num_special_tokens: int
    version: str


class _Image(msgspec.Struct):
    max_image_size: int


class Tekken(msgspec.Struct):
    """tekken.json. `multimodal` is the older name of `image`."""

    config: _Config
    vocab: list[_Token]
    special_tokens: list[_Special] | None = None
    image: _Image | None = None
    multimodal: _Image | None = None

    @property
    def longest(self) -> int | None:
        """Edge of an image, in pixels, that none exceeds; None where the file does not say."""
        image = self.image or self.multimodal
        return None if image is None else image.max_image_size

    @property
    def special(self) -> list[str]:
        """By their ids, with the fillers."""
        named = list(_BEFORE_LISTS)
        if self.special_tokens is not None:
            named = [token.token_str for token in sorted(self.special_tokens, key=lambda token: token.rank)]
        return [
            *named,
            *(f"<SPECIAL_{number}>" for number in range(len(named), self.config.default_num_special_tokens)),
        ]


def read_tekken(file: Path) -> Tekken:
    """Raises ArtefactError for a file that is no such tokenizer."""
    try:
        tekken = msgspec.json.decode(file.read_bytes(), type=Tekken)
    except OSError as error:
        raise ArtefactError(f"{file} cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ArtefactError(f"tekken.json of the model is no tokenizer of Mistral's: {error}") from error
    count, sizes, special = tekken.config.default_num_special_tokens, tekken.config, tekken.special
    ranks = [token.rank for token in tekken.special_tokens or ()]
    if sorted(ranks) != list(range(len(ranks))) or len(special) != count or len(set(special)) != count:
        raise ArtefactError(
            f"tekken.json of the model lists special tokens that are not the {count} of its "
            "default_num_special_tokens, numbered from 0: fetch it again"
        )
    if not 256 <= sizes.default_vocab_size - count <= len(tekken.vocab):
        raise ArtefactError(
            f"tekken.json of the model has {len(tekken.vocab)} tokens and {count} special ones, which do not fit its "
            f"default_vocab_size {sizes.default_vocab_size}: fetch it again"
        )
    return tekken


def tokenizer_files(tekken: Tekken) -> dict[str, Any]:
    """tokenizer.json and tokenizer_config.json."""
    special = tekken.special
    pieces = _pieces(tekken)
    spelled = {piece: _spelled(piece) for piece in pieces}
    vocab = {spelled[piece]: len(special) + rank for piece, rank in pieces.items()}
    added = [
        {"id": number, "content": text, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for number, text in enumerate(special)
    ]
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    splits = {
        "type": "Split",
        "pattern": {"Regex": tekken.config.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    begins = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    begin_id = special.index("<s>")
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [splits, bytes_only]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begins, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                begins,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [begin_id], "tokens": ["<s>"]}},
        },
        "decoder": bytes_only,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": dict(zip(special, range(len(special)), strict=True)) | vocab,
            "merges": [[spelled[left], spelled[right]] for left, right in _merges(pieces)],
        },
    }
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in named.items() if token in special},
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _pieces(tekken: Tekken) -> dict[bytes, int]:
    """The bytes of each token but the special ones -> rank. More are listed than the model has."""
    listed = tekken.vocab[: tekken.config.default_vocab_size - tekken.config.default_num_special_tokens]
    try:
        pieces = {base64.b64decode(token.token_bytes): rank for rank, token in enumerate(listed)}
    except (binascii.Error, ValueError) as error:
        raise ArtefactError(
            "tekken.json of the model has token_bytes that are no base64: fetch it again"
        ) from error
    if len(pieces) != len(listed) or not all(bytes([byte]) in pieces for byte in range(256)):
        raise ArtefactError("tekken.json of the model lists a token twice, or not every byte: fetch it again")
    return pieces


def _merges(pieces: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return all pairs of tokens that form another token, in the order in which they are merged.

    The order is that of the rank of the token that they form.
    """
    found: list[tuple[bytes, bytes]] = []
    for piece in pieces:  # in the order of their ranks
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in pieces and pair[1] in pieces]
        found += sorted(known, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
    return found


def _alphabet() -> dict[int, str]:
    """Return the character that stands for each byte in byte-level vocabularies.

    A visible character stands for itself; the others are numbered from U+0100 on, in order.
    """
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + at) for at, byte in enumerate(others)}


_ALPHABET = _alphabet()


def _spelled(piece: bytes) -> str:
    return "".join(_ALPHABET[byte] for byte in piece)
