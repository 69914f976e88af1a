"""What TGI's replies look like, and those about tokens. Tests hold every reply to them."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from handlers.protocols.tokens import SimpleToken


class TgiToken(Struct, forbid_unknown_fields=True):
    id: int
    text: str
    logprob: float | None
    special: bool


class TgiPrefillToken(Struct, forbid_unknown_fields=True):
    id: int
    text: str
    logprob: float | None


class TgiDetails(Struct, forbid_unknown_fields=True):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[TgiPrefillToken]
    tokens: list[TgiToken]
    top_tokens: list[list[TgiToken]] = []
    best_of_sequences: list[dict[str, Any]] = []


class TgiReply(Struct, forbid_unknown_fields=True):
    generated_text: str
    details: TgiDetails | None = None


class TgiStreamDetails(Struct, forbid_unknown_fields=True):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    input_length: int


class TgiEvent(Struct, forbid_unknown_fields=True):
    """`data:` of one event: a token; the last one has the whole text."""

    index: int
    token: TgiToken
    generated_text: str | None
    details: TgiStreamDetails | None
    top_tokens: list[TgiToken] = []


class TgiError(Struct, forbid_unknown_fields=True):
    error: str
    error_type: str


class Info(Struct):
    """What TGI's clients look at; there is more."""

    model_id: str
    version: str


class ChatTokens(Struct, forbid_unknown_fields=True):
    tokenize_response: list[SimpleToken]
    templated_text: str


class TokenCounts(Struct, forbid_unknown_fields=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Struct, forbid_unknown_fields=True):
    prompt: str
