"""Sampling and stopping rules of a request, used by the handlers and the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

MAX_LOGPROBS = 20
"""Greatest number of alternatives per position that a request may ask for (OpenAI's limit for `top_logprobs`)."""

MAX_INTEGER = 2**31 - 1
"""Greatest count or token id; every array that holds one can represent it."""

MAX_SEED = 2**63 - 1
MAX_STOP_TOKEN_IDS = 1024
MAX_ALLOWED_TOKEN_IDS = 1 << 20
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_TOKENS = 1 << 14
"""Limit for all unwanted words together, because each step may compare all of them with the completion."""

MAX_BREAKERS = 1024
MAX_MATCH = 254
"""Greatest length of a repetition that is measured; longer ones count as this long (`SuffixMatches`)."""

SAMPLERS = (
    "TOP_P_TOP_K", "TOP_A", "MIN_P", "TFS", "TYPICAL_P", "TEMPERATURE", "PENALTIES", "DRY", "NO_REPEAT_NGRAM",
    "TOP_NSIGMA", "ETA_CUTOFF", "EPSILON_CUTOFF", "QUADRATIC", "XTC",
)  # fmt: skip
"""Samplers that `sampler_priority` puts in order; their indices here are Aphrodite's and KoboldCpp's numbers."""

FIRST_SAMPLERS = frozenset({"PENALTIES", "DRY", "NO_REPEAT_NGRAM"})
"""Samplers that change single logits; they always come before the others."""

RANGES: dict[str, tuple[float, float, str]] = {
    "top_a": (0.0, 100.0, "from 0 to 100"),
    "eta_cutoff": (0.0, 1e9, "from 0 to 1e9, in units of 1e-4"),
    "epsilon_cutoff": (0.0, 1000.0, "from 0 to 1000, in units of 1e-4"),
    "smoothing_factor": (0.0, 1000.0, "from 0 to 1000"),
    "smoothing_curve": (1.0, 100.0, "from 1 to 100"),
    "dynatemp_min": (0.0, 100.0, "from 0 to 100"),
    "dynatemp_max": (0.0, 100.0, "from 0 to 100"),
    "dynatemp_exponent": (0.0, 100.0, "from 0 to 100"),
    "xtc_threshold": (0.0, 1.0, "from 0 to 1"),
    "xtc_probability": (0.0, 1.0, "from 0 to 1"),
    "nsigma": (0.0, 1e6, "from 0 to 1e6"),
    "dry_multiplier": (0.0, 1e6, "from 0 to 1e6"),
    "dry_base": (1.0, 1000.0, "from 1 to 1000"),
    "dry_allowed_length": (0, MAX_MATCH, f"from 0 to {MAX_MATCH}"),
    "dry_range": (-1, MAX_INTEGER, f"-1, 0 (all) or from 1 to {MAX_INTEGER}"),
    "mirostat_tau": (0.0, 1000.0, "from 0 to 1000"),
    "mirostat_eta": (0.0, 1000.0, "from 0 to 1000"),
    "no_repeat_ngram_size": (0, MAX_MATCH, f"from 0 (off) to {MAX_MATCH}"),
    "skew": (-10.0, 10.0, "from -10 to 10"),
}
"""Field -> smallest value, greatest value, and a description of the range."""


_ABOVE_0 = math.nextafter(0.0, 1.0)
_COMMON_RANGES: dict[str, tuple[float, float, str]] = {
    "max_tokens": (1, MAX_INTEGER, f"from 1 to {MAX_INTEGER}"),
    "min_tokens": (0, MAX_INTEGER, f"from 0 to {MAX_INTEGER}"),
    "temperature": (0.0, 100.0, "from 0 to 100"),
    "top_k": (-1, MAX_INTEGER, f"-1, 0 (all) or from 1 to {MAX_INTEGER}"),
    "top_p": (_ABOVE_0, 1.0, "above 0, at most 1"),
    "min_p": (0.0, 1.0, "from 0 to 1"),
    "typical_p": (_ABOVE_0, 1.0, "above 0, at most 1"),
    "repetition_penalty": (_ABOVE_0, 100.0, "above 0, at most 100"),
    "presence_penalty": (-2.0, 2.0, "from -2 to 2"),
    "frequency_penalty": (-2.0, 2.0, "from -2 to 2"),
    "logprobs": (0, MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
    "prompt_logprobs": (0, MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
    "seed": (0, MAX_SEED, f"from 0 to {MAX_SEED}"),
    "tfs": (_ABOVE_0, 1.0, "above 0, at most 1"),
}
"""Ranges of the fields that are not in `RANGES`."""

_ALL_RANGES = _COMMON_RANGES | RANGES


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """Sampling and stopping rules of one request.

    A protocol has already answered a client's bad value with a 4xx; `validate` is the engine's own check.
    `temperature == 0` is greedy and ignores top_k, top_p, min_p, typical_p and seed. The fields from `top_a`
    on are Aphrodite's; for their formulas see `engine.warping` and `engine.repetition`.

    Attributes:
        max_tokens: Greatest number of tokens to generate; None means up to the end of the context.
        min_tokens: End-of-sequence and stop ids are ignored before this many tokens.
        top_k: 0 or -1 means all.
        repetition_penalty: Applies to prompt and completion (Keskar et al. 2019, CTRL); 1.0 means none.
        presence_penalty: Applies to the completion only, as OpenAI documents it.
        frequency_penalty: Applies to the completion only, as OpenAI documents it.
        seed: Makes the draw reproducible in any batch; from 0 to MAX_SEED.
        stop_token_ids: Ids that end the completion, in addition to the model's end-of-sequence ids.
        logprobs: None for none, 0 for the chosen token alone, k for k alternatives beside it.
        prompt_logprobs: The same for the prompt's positions (the first position has none).
        allowed_token_ids: The only tokens that can be chosen; None means all.
        bad_words_token_ids: Sequences of ids whose last id is masked where the completion ends with the others.
        eta_cutoff: In units of 1e-4.
        epsilon_cutoff: In units of 1e-4.
        dry_range: Number of last tokens that DRY considers.
        dry_sequence_breaker_ids: Tokens that end a repetition.
        sampler_priority: All of SAMPLERS, by name or number, in the order in which they are applied.
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
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()

    top_a: float = 0.0
    tfs: float = 1.0
    eta_cutoff: float = 0.0
    epsilon_cutoff: float = 0.0
    smoothing_factor: float = 0.0
    smoothing_curve: float = 1.0
    dynatemp_min: float = 0.0
    dynatemp_max: float = 0.0
    dynatemp_exponent: float = 1.0
    temperature_last: bool = False
    xtc_threshold: float = 0.1
    xtc_probability: float = 0.0
    nsigma: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int = 0
    dry_sequence_breaker_ids: tuple[int, ...] = ()
    mirostat_mode: int = 0
    mirostat_tau: float = 0.0
    mirostat_eta: float = 0.0
    no_repeat_ngram_size: int = 0
    skew: float = 0.0
    sampler_priority: tuple[int | str, ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def validate(self) -> None:
        """Check all fields.

        Raises:
            ValueError: Names the first field that is out of range, its value, and what is allowed.
        """
        for name, (least, greatest, words) in _ALL_RANGES.items():
            value = getattr(self, name)
            _require(value is None or least <= value <= greatest, name, value, words)
        _require(self.mirostat_mode in (0, 2), "mirostat_mode", self.mirostat_mode, "0 (off) or 2")
        self._validate_stops()
        for token in self.logit_bias or ():
            _require(0 <= token <= MAX_INTEGER, "logit_bias", token, f"token ids from 0 to {MAX_INTEGER}")
        self._validate_words()
        if self.sampler_priority:
            sampler_order(self.sampler_priority)

    def _validate_words(self) -> None:
        if self.allowed_token_ids is not None:
            bounded("allowed_token_ids", len(self.allowed_token_ids), "ids", 1, MAX_ALLOWED_TOKEN_IDS)
            _require_ids("allowed_token_ids", self.allowed_token_ids)
        bounded("bad_words_token_ids", len(self.bad_words_token_ids), "runs", 0, 2 * MAX_BAD_WORDS)
        for run in self.bad_words_token_ids:
            bounded("bad_words_token_ids", len(run), "ids in a run", 1, MAX_BAD_WORD_TOKENS)
            _require_ids("bad_words_token_ids", run)
        total = sum(map(len, self.bad_words_token_ids))
        bounded("bad_words_token_ids", total, "ids in all", 0, MAX_BAD_WORD_TOKENS)
        bounded("dry_sequence_breaker_ids", len(self.dry_sequence_breaker_ids), "ids", 0, 2 * MAX_BREAKERS)
        _require_ids("dry_sequence_breaker_ids", self.dry_sequence_breaker_ids)

    def _validate_stops(self) -> None:
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(
                f"stop_token_ids holds {len(self.stop_token_ids)} ids; allowed: at most {MAX_STOP_TOKEN_IDS}"
            )
        for token in self.stop_token_ids:
            _require(0 <= token <= MAX_INTEGER, "stop_token_ids", token, f"token ids from 0 to {MAX_INTEGER}")


def sampler_order(priority: Sequence[int | str]) -> tuple[str, ...]:
    """Return the names of the samplers in `sampler_priority`.

    Raises:
        ValueError: Unless each sampler occurs once, and `FIRST_SAMPLERS` come first.
    """
    names = []
    for item in priority[: len(SAMPLERS) + 1]:
        known = 0 <= item < len(SAMPLERS) if isinstance(item, int) else item.upper() in SAMPLERS
        if not known:
            raise ValueError(f"sampler_priority holds {shown(item)[:40]}; allowed: {', '.join(SAMPLERS)}")
        names.append(SAMPLERS[item] if isinstance(item, int) else item.upper())
    missing = [name for name in SAMPLERS if name not in names]
    if missing:
        raise ValueError(f"sampler_priority leaves out {', '.join(missing)}; it must hold all samplers")
    if len(priority) > len(SAMPLERS):
        raise ValueError("sampler_priority holds a sampler twice")
    if set(names[: len(FIRST_SAMPLERS)]) != FIRST_SAMPLERS:
        raise ValueError(f"sampler_priority must begin with {', '.join(sorted(FIRST_SAMPLERS))} in any order")
    return tuple(names)


def _require_ids(name: str, ids: Sequence[int]) -> None:
    if ids and not (min(ids) >= 0 and max(ids) <= MAX_INTEGER):
        bad = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(f"{name} holds {shown(bad)}; allowed: token ids from 0 to {MAX_INTEGER}")


def bounded(name: str, count: int, what: str, least: int, most: int) -> None:
    """Raise ValueError unless there are from `least` to `most` of what a field holds."""
    if not least <= count <= most:
        raise ValueError(f"{name} holds {count} {what}; allowed: from {least} to {most}")


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {shown(value)}; allowed: {allowed}")


def shown(value: object) -> str:
    """Format a value for a message; a number of hundreds of digits is only described."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    return repr(value)
