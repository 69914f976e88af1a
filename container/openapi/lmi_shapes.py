"""What LMI's replies, and SageMaker's sessions, look like. Tests hold every reply to them."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct


class LmiToken(Struct, forbid_unknown_fields=True):
    id: int | None
    text: str
    log_prob: float | None
    special_token: bool = False


class LmiSequence(Struct):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    inputs: str | None = None
    tokens: list[LmiToken] = []
    prefill: list[LmiToken] = []
    top_tokens: list[list[LmiToken]] = []
    best_of_sequences: list[dict[str, Any]] = []


class LmiReply(Struct, forbid_unknown_fields=True):
    generated_text: str
    details: LmiSequence | None = None


class LmiLine(Struct):
    """One line of a stream; the last one has the whole text."""

    token: LmiToken
    top_tokens: list[LmiToken] = []
    generated_text: str | None = None
    details: dict[str, Any] | None = None


class SessionReply(Struct, forbid_unknown_fields=True):
    result: str


class SessionBody(Struct):
    """A session opened or closed, on SageMaker's routes."""

    requestType: Literal["NEW_SESSION", "CLOSE"]


class LmiError(Struct, forbid_unknown_fields=True):
    code: int
    type: str
    message: str
    error: str
