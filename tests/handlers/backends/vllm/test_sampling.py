"""Requests in vLLM's words: what an engine of vLLM's would end at is mended or refused before it sees it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.sampling_params import MAX_INTEGER, MAX_SEED, SamplingParams
from handlers.backends.vllm import compat
from handlers.backends.vllm.compat import RunnerRoom
from handlers.backends.vllm.prompts import room as rooms
from handlers.backends.vllm.prompts.sampling import check_prompt_logprobs, to_vllm
from handlers.errors import InvalidRequest

ROOM = RunnerRoom(allowed_token_ids=4, logit_bias=3, stop_token_ids=5, bad_words=2, bad_word_tokens=6)


@dataclass
class Theirs:
    """As much of vLLM's SamplingParams as is used here; a word is spelled by its letters."""

    n: int = 1
    output_kind: Any = None
    seed: int | None = None
    min_tokens: int = 0
    allowed_token_ids: list[int] | None = None
    logit_bias: dict[int, float] | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    bad_words: list[str] = field(default_factory=list)
    bad_words_token_ids: list[list[int]] | None = None

    def clone(self) -> Theirs:
        return Theirs(bad_words=self.bad_words)

    def update_from_tokenizer(self, tokenizer: Any) -> None:
        self.bad_words_token_ids = [tokenizer(word) for word in self.bad_words]


def theirs(**given: Any) -> Theirs:
    names = Theirs.__dataclass_fields__
    return Theirs(**{name: value for name, value in given.items() if name in names})


VLLM: Any = SimpleNamespace(
    SamplingParams=theirs, RequestOutputKind=SimpleNamespace(DELTA="delta"), refusals=(ValueError,)
)


def asked(n: int = 1, **params: Any) -> Theirs:
    made: Theirs = to_vllm(VLLM, SamplingParams(**params), n)
    return made


class TestSeeds:
    """vLLM draws answer i with seed + i, which its newer model runner keeps in 63 bits and a sign."""

    @pytest.mark.parametrize("n", [1, 2, 128])
    @pytest.mark.parametrize("more", [{}, {"top_a": 0.5}])
    def test_the_last_answers_fits_too(self, n: int, more: dict[str, Any]) -> None:
        made = asked(n, seed=MAX_SEED, **more)
        assert made.seed is not None
        assert made.seed + n - 1 == MAX_SEED

    def test_others_stay(self) -> None:
        assert asked(128, seed=MAX_SEED - 127).seed == MAX_SEED - 127
        assert asked(2, seed=0).seed == 0
        assert asked(2).seed is None


def test_min_tokens_without_an_end_stays_a_length() -> None:
    """Prompt and min_tokens together are a number of 31 bits there."""
    assert asked(min_tokens=MAX_INTEGER).min_tokens + 2**20 < 2**31
    assert asked(min_tokens=MAX_INTEGER, max_tokens=7).min_tokens == 7
    assert asked(min_tokens=3).min_tokens == 3


def checked(made: Theirs, eos: Sequence[int] = (), newer: bool = True) -> None:
    engine = SimpleNamespace(
        vllm_config=SimpleNamespace(use_v2_model_runner=newer), get_tokenizer=lambda: list
    )

    async def check() -> None:
        with ThreadPoolExecutor(1) as threads:
            await rooms.check_room(VLLM, engine, made, eos, threads)

    asyncio.run(check())


@pytest.mark.parametrize(
    ("fits", "too_much", "message"),
    [
        (
            {"allowed_token_ids": (1, 2, 3, 4, 4)},
            {"allowed_token_ids": (1, 2, 3, 4, 5)},
            "allowed_token_ids names 5 tokens; allowed: 4",
        ),
        (
            {"logit_bias": {1: 1.0, 2: 1.0, 3: 1.0}},
            {"logit_bias": {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}},
            "logit_bias names 4 tokens; allowed: 3",
        ),
        (
            {"min_tokens": 1, "stop_token_ids": (1, 2, 3, 8)},
            {"min_tokens": 1, "stop_token_ids": (1, 2, 3, 4)},
            "stop_token_ids and the model's own ends are 6 tokens; allowed: 5 with min_tokens",
        ),
        (
            {"stop_token_ids": (1, 2, 3, 4)},
            {"min_tokens": 9, "stop_token_ids": (1, 2, 3, 4)},
            "stop_token_ids and the model's own ends are 6 tokens; allowed: 5 with min_tokens",
        ),
        (
            {"bad_words": ("abc", "def")},
            {"bad_words": ("a", "b", "c")},
            "bad_words holds 3 words; allowed: 2",
        ),
        (
            {"bad_words": ("abc", "def")},
            {"bad_words": ("abc", "defg")},
            "bad_words are 7 tokens, as they begin a text and after a space; allowed: 6 in all",
        ),
    ],
)
def test_what_the_newer_runner_has_no_room_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, fits: dict[str, Any], too_much: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(compat, "_newer_runner_room", lambda: ROOM)
    checked(asked(**fits), (8, 9))
    with pytest.raises(InvalidRequest) as caught:
        checked(asked(**too_much), (8, 9))
    assert str(caught.value) == message
    assert caught.value.param == message.split()[0]
    checked(asked(**too_much), (8, 9), newer=False)


def test_a_vllm_that_does_not_tell_its_runner_may_have_the_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_newer_runner_room", lambda: ROOM)
    assert compat.runner_room(SimpleNamespace()) == ROOM
    assert compat.runner_room(SimpleNamespace(use_v2_model_runner=False)) is None


def test_most_requests_are_not_looked_at_closely() -> None:
    engine = SimpleNamespace()
    with ThreadPoolExecutor(1) as threads:
        made = asked(seed=3, stop_token_ids=tuple(range(1000)))
        asyncio.run(rooms.check_room(VLLM, engine, made, (), threads))


class Taking(SimpleNamespace):
    """One of the newer runner's classes without a device's memory: what it does with a new request.

    Its tensors are arrays of one element, and what is staged for the device is lost.
    """

    def __init__(self, module: str, name: str) -> None:
        found = getattr(pytest.importorskip(f"vllm.v1.worker.gpu.sample.{module}"), name)
        self._add = found.add_request
        self.prompt_len_np = [4]
        self.use_logit_bias = [False]
        self.vocab_size = 300
        self.seeds_set = [False]
        self.num_logprobs = [0]

    def __getattr__(self, name: str) -> Any:
        kept = np.zeros(1, np.int64 if name == "seeds" else np.float32)
        return SimpleNamespace(np=kept, stage_write=lambda *write: None)

    def __call__(self, params: Any) -> None:
        length = [4] if "prompt_len" in inspect.signature(self._add).parameters else []
        self._add(self, 0, *length, params)


class TestVllmsOwn:
    """What is let through is taken by the classes of the installed vLLM that end the engine, and no more than that."""

    def test_seeds(self) -> None:
        states = Taking("states", "SamplingStates")
        params = to_vllm(compat.load(), SamplingParams(seed=MAX_SEED), 3)
        params.seed += 2
        states(params)
        params.seed += 1
        with pytest.raises(OverflowError):
            states(params)

    @pytest.mark.parametrize("name", ["allowed_token_ids", "logit_bias", "stop_token_ids"])
    def test_ids(self, name: str) -> None:
        states = Taking("logit_bias", "LogitBiasState")
        room = compat._newer_runner_room()

        def params(count: int) -> Any:
            ids = tuple(range(count))
            value = dict.fromkeys(ids, 1.0) if name == "logit_bias" else ids
            return to_vllm(compat.load(), SamplingParams(min_tokens=1, **{name: value}), 1)

        most = getattr(room, name)
        states(params(most))
        rooms.check_ids(room, params(most), ())
        with pytest.raises(ValueError, match="Too many"):
            states(params(most + 1))
        with pytest.raises(InvalidRequest, match=f"^{name} "):
            rooms.check_ids(room, params(most + 1), ())

    def test_words(self) -> None:
        states = Taking("bad_words", "BadWordsState")
        room = compat._newer_runner_room()
        letters = SimpleNamespace(
            encode=lambda text, add_special_tokens: [ord(letter) for letter in text], max_token_id=300
        )

        def params(tokens: int) -> Any:
            half = tokens // 2
            return to_vllm(compat.load(), SamplingParams(bad_words=("a" * half, "b" * (tokens - half))), 1)

        def spelled(tokens: int) -> Any:
            made = params(tokens)
            made.update_from_tokenizer(letters)
            return made

        most = room.bad_word_tokens
        states(spelled(most))
        rooms.check_bad_words(compat.load(), room, params(most), letters)
        with pytest.raises(ValueError, match="Too many"):
            states(spelled(most + 1))
        with pytest.raises(InvalidRequest, match=f"^bad_words are {most + 1} tokens"):
            rooms.check_bad_words(compat.load(), room, params(most + 1), letters)


class TestPromptLogprobs:
    """vLLM makes objects of them on the event loop, once for each answer and slowly where it makes text."""

    @pytest.mark.parametrize(
        ("params", "tokens", "answers"),
        [
            ({"prompt_logprobs": 1}, 2**17, 1),
            ({"prompt_logprobs": 1}, 2**14, 8),
            ({"prompt_logprobs": 0, "stop": ("x",)}, 2**18 // 20, 1),
            ({}, 2**20, 128),
        ],
    )
    def test_as_many_as_take_little_time_are_made(
        self, params: dict[str, Any], tokens: int, answers: int
    ) -> None:
        check_prompt_logprobs(SamplingParams(**params), tokens, answers)
        if params:
            with pytest.raises(InvalidRequest, match=r"^prompt_logprobs is .*; allowed: \d+ probabilities"):
                check_prompt_logprobs(SamplingParams(**params), tokens + 1, answers)

    def test_the_refusal_says_what_counts(self) -> None:
        with pytest.raises(InvalidRequest) as caught:
            check_prompt_logprobs(SamplingParams(prompt_logprobs=20, stop=("x",)), 4000, 3)
        assert str(caught.value) == (
            "prompt_logprobs is 20, for a prompt of 4000 tokens and 3 answers; "
            "allowed: 13107 probabilities in all where there are stop strings"
        )
