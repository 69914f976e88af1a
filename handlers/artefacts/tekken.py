"""Mistral's tokenizers: from `tekken.json` to the files of the Hugging Face format, and to a chat template.

The format of `tekken.json`, and the ids of its tokens, are as in mistral_common's tokens/tokenizers/tekken.py.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from handlers.artefacts import ArtefactError

TEKKEN = "tekken.json"

VERSIONS = ("v3", "v7", "v11", "v13", "v15")
"""Versions of the tokenizer whose chats mistral.jinja writes."""

UNLISTED_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""The special tokens of older files, which do not list them, in the order of their ids."""


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


class _Effort(msgspec.Struct):
    """The reasoning efforts that the model knows, and the default for requests that name none."""

    values: list[str] = []
    default: str = ""


class _Settings(msgspec.Struct):
    reasoning_effort: _Effort | None = None


class Tekken(msgspec.Struct):
    """tekken.json. `multimodal` is the older name of `image`."""

    config: _Config
    vocab: list[_Token]
    special_tokens: list[_Special] | None = None
    image: _Image | None = None
    multimodal: _Image | None = None
    model_settings_builder: _Settings | None = None

    @property
    def reasoning_effort(self) -> _Effort:
        """The reasoning efforts that can be written into a prompt; there are none before version 15."""
        settings = self.model_settings_builder
        return (settings and settings.reasoning_effort) or _Effort()

    @property
    def longest(self) -> int | None:
        """The longest edge that an image may have, in pixels; None if the file does not say."""
        image = self.image or self.multimodal
        return None if image is None else image.max_image_size

    @property
    def special(self) -> list[str]:
        """The special tokens in the order of their ids, with those that fill up their number."""
        named = list(UNLISTED_SPECIAL)
        if self.special_tokens is not None:
            named = [token.token_str for token in sorted(self.special_tokens, key=lambda token: token.rank)]
        return named + [f"<SPECIAL_{at}>" for at in range(len(named), self.config.default_num_special_tokens)]


def read_tekken(file: Path) -> Tekken:
    """Read and check the file. Raises ArtefactError if it is not such a tokenizer."""
    try:
        tekken = msgspec.json.decode(file.read_bytes(), type=Tekken)
    except OSError as error:
        raise ArtefactError(f"{file} cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ArtefactError(f"tekken.json of the model is not one of Mistral's tokenizers: {error}") from error
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


def chat_template(tekken: Tekken) -> str | None:
    """Return the chat template for a tokenizer of Mistral's; None if the format of its chats is not known."""
    version = tekken.config.version
    if version not in VERSIONS:
        return None
    template = Path(__file__).with_name("mistral.jinja").read_text(encoding="utf-8")
    effort = tekken.reasoning_effort
    known = {"version": int(version[1:]), "efforts": effort.values, "default_effort": effort.default}
    values = (f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in known.items())
    return "".join(values) + template


def tokenizer_files(tekken: Tekken) -> dict[str, Any]:
    """Return the contents of tokenizer.json and tokenizer_config.json. Raises ArtefactError."""
    special = tekken.special
    ranks = _ranks(tekken)
    text = {piece: "".join(_ALPHABET[byte] for byte in piece) for piece in ranks}
    vocabulary = {token: number for number, token in enumerate([*special, *text.values()])}
    merges = [(text[left], text[right]) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=True))
    try:
        split = pre_tokenizers.Split(Regex(tekken.config.pattern), "isolated")
    except Exception as error:  # tokenizers raises no class of its own
        raise ArtefactError(f"tekken.json of the model has a pattern that cannot be read: {error}") from error
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", special.index("<s>"))]
    )
    tokenizer.add_special_tokens(special)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in named.items() if token in special},
    }
    return {"tokenizer.json": json.loads(tokenizer.to_str()), "tokenizer_config.json": config}


def _ranks(tekken: Tekken) -> dict[bytes, int]:
    """Return the rank of each ordinary token, by its bytes. The file may list more tokens than the model has."""
    listed = tekken.vocab[: tekken.config.default_vocab_size - tekken.config.default_num_special_tokens]
    try:
        ranks = {base64.b64decode(token.token_bytes): rank for rank, token in enumerate(listed)}
    except ValueError as error:
        raise ArtefactError("tekken.json of the model has token_bytes that are not base64: fetch it again") from error
    if len(ranks) != len(listed) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ArtefactError("tekken.json of the model lists a token twice, or not every byte: fetch it again")
    return ranks


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield all pairs of tokens that form another token, by its rank: the order in which they are merged."""
    for piece in ranks:
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _VISIBLE]
_ALPHABET = dict(zip(_VISIBLE + _OTHERS, map(chr, [*_VISIBLE, *range(256, 256 + len(_OTHERS))]), strict=True))
"""Byte -> the character that stands for it in byte-level vocabularies: a visible one stands for itself, and the others
are numbered from U+0100 on."""
