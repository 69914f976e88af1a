"""How the next token is chosen, and when to stop: one value per request, shared by every room above."""

from __future__ import annotations

import msgspec

MAX_LOGPROBS = 20
"""Most alternatives that a request may ask for per position (OpenAI's limit for `top_logprobs`)."""

MAX_INTEGER = 2**31 - 1
"""Largest count or token id: every array that holds one has room for it."""

MAX_SEED = 2**63 - 1
MAX_STOP_TOKEN_IDS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1000
"""Per stop string: so much text may be held back while the string is undecided."""


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """Sampling and stopping rules of one request.

    Built by a dialect, which has already answered a client's bad value with a 4xx; `validate` is the
    engine's own last word. `temperature == 0` is greedy and ignores top_k, top_p, min_p, typical_p and seed.

    max_tokens: most tokens to generate; None means "up to the context's end".
    min_tokens: end-of-sequence, stop ids and stop strings are not honoured before this many tokens.
    top_k: 0 or -1 means all.
    logprobs: None for none, 0 for the chosen token alone, k for k alternatives beside it.
    prompt_logprobs: the same for the prompt's positions (the first position has none).
    stop: strings that end the answer; not part of the text unless include_stop_str_in_output.
    stop_token_ids: ids that end the answer, beside the model's own end-of-sequence ids.
    seed: makes the draw reproducible, whatever else shares the batch; from 0 to MAX_SEED.
    repetition_penalty: over prompt and answer (Keskar et al. 2019, CTRL); 1.0 is none.
    presence_penalty, frequency_penalty: over the answer alone, as OpenAI documents them.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def validate(self) -> None:
        """Raise ValueError naming the first field that is out of range, its value and what is allowed."""
        _require(
            self.max_tokens is None or 1 <= self.max_tokens <= MAX_INTEGER,
            "max_tokens",
            self.max_tokens,
            f"from 1 to {MAX_INTEGER}",
        )
        _require(
            0 <= self.min_tokens <= MAX_INTEGER, "min_tokens", self.min_tokens, f"from 0 to {MAX_INTEGER}"
        )
        _require(0.0 <= self.temperature <= 100.0, "temperature", self.temperature, "from 0 to 100")
        _require(
            -1 <= self.top_k <= MAX_INTEGER, "top_k", self.top_k, f"-1, 0 (all) or from 1 to {MAX_INTEGER}"
        )
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0, at most 1")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "from 0 to 1")
        _require(0.0 < self.typical_p <= 1.0, "typical_p", self.typical_p, "above 0, at most 1")
        _require(
            0.0 < self.repetition_penalty <= 100.0,
            "repetition_penalty",
            self.repetition_penalty,
            "above 0, at most 100",
        )
        _require(
            -2.0 <= self.presence_penalty <= 2.0, "presence_penalty", self.presence_penalty, "from -2 to 2"
        )
        _require(
            -2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", self.frequency_penalty, "from -2 to 2"
        )
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            _require(count is None or 0 <= count <= MAX_LOGPROBS, name, count, f"from 0 to {MAX_LOGPROBS}")
        _require(self.seed is None or 0 <= self.seed <= MAX_SEED, "seed", self.seed, f"from 0 to {MAX_SEED}")
        self._validate_stops()
        for token in self.logit_bias or ():
            _require(0 <= token <= MAX_INTEGER, "logit_bias", token, f"token ids from 0 to {MAX_INTEGER}")

    def _validate_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(f"stop holds {len(self.stop)} strings; allowed: at most {MAX_STOP_STRINGS}")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise ValueError(
                    f"stop holds a string of {len(text)} characters; allowed: from 1 to {MAX_STOP_CHARACTERS}"
                )
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(
                f"stop_token_ids holds {len(self.stop_token_ids)} ids; allowed: at most {MAX_STOP_TOKEN_IDS}"
            )
        for token in self.stop_token_ids:
            _require(0 <= token <= MAX_INTEGER, "stop_token_ids", token, f"token ids from 0 to {MAX_INTEGER}")


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {shown(value)}; allowed: {allowed}")


def shown(value: object) -> str:
    """A number for a message: one of hundreds of digits is described instead."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    return repr(value)
