"""Requests in vLLM's words: what an engine of vLLM's would end at is mended or refused before it sees it."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.config import VllmConfig

from engine.sampling_params import MAX_INTEGER, MAX_SEED
from handlers.backends.vllm import compat
from handlers.backends.vllm.compat import RunnerLimits, load
from handlers.backends.vllm.sampling import check_runner_limits, to_vllm
from handlers.errors import InvalidRequest
from handlers.request import RequestSampling

LIMITS = RunnerLimits(allowed_token_ids=4, logit_bias=3, stop_token_ids=5, bad_word_tokens=6)


LETTERS: Any = SimpleNamespace(
    encode=lambda text, add_special_tokens: [ord(letter) for letter in text], max_token_id=300
)
"""A tokenizer that spells a word by its letters."""


def asked(n: int = 1, **params: Any) -> Any:
    return to_vllm(load(), RequestSampling(**params), n)


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


def check(config: VllmConfig, made: Any) -> None:
    """For a model with two ends of its own."""
    if (limits := compat.runner_limits(config)) is not None:
        check_runner_limits(load(), limits, made, (8, 9), LETTERS)


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
            {"bad_words": ("abc", "defg")},
            "bad_words are 7 tokens, as they begin a text and after a space; allowed: 6 in all",
        ),
    ],
)
def test_what_is_too_long_for_the_newer_runner_is_refused(
    monkeypatch: pytest.MonkeyPatch, fits: dict[str, Any], too_much: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(compat, "newer_runner_limits", lambda: LIMITS)
    config = VllmConfig()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    check(config, asked(**fits))
    with pytest.raises(InvalidRequest) as caught:
        check(config, asked(**too_much))
    assert str(caught.value) == message
    assert caught.value.param == message.split()[0]
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    check(config, asked(**too_much))


class Taking(SimpleNamespace):
    """One of the newer runner's classes without a device's memory: what it does with a new request.

    Its tensors are arrays of one element, and what is staged for the device is lost.
    """

    def __init__(self, module: str, name: str) -> None:
        self._add = getattr(import_module(f"vllm.v1.worker.gpu.sample.{module}"), name).add_request
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
        params = asked(3, seed=MAX_SEED)
        params.seed += 2
        states(params)
        params.seed += 1
        with pytest.raises(OverflowError):
            states(params)

    @pytest.mark.parametrize("name", ["allowed_token_ids", "logit_bias", "stop_token_ids"])
    def test_ids(self, name: str) -> None:
        states = Taking("logit_bias", "LogitBiasState")
        limits = compat.newer_runner_limits()

        def params(count: int) -> Any:
            ids = tuple(range(count))
            return asked(min_tokens=1, **{name: dict.fromkeys(ids, 1.0) if name == "logit_bias" else ids})

        most = getattr(limits, name)
        states(params(most))
        check_runner_limits(load(), limits, params(most), (), LETTERS)
        with pytest.raises(ValueError, match="Too many"):
            states(params(most + 1))
        with pytest.raises(InvalidRequest, match=f"^{name} "):
            check_runner_limits(load(), limits, params(most + 1), (), LETTERS)

    def test_words(self) -> None:
        states = Taking("bad_words", "BadWordsState")
        limits = compat.newer_runner_limits()

        def params(tokens: int) -> Any:
            half = tokens // 2
            return asked(bad_words=("a" * half, "b" * (tokens - half)))

        def spelled(tokens: int) -> Any:
            made = params(tokens)
            made.update_from_tokenizer(LETTERS)
            return made

        most = limits.bad_word_tokens
        states(spelled(most))
        check_runner_limits(load(), limits, params(most), (), LETTERS)
        with pytest.raises(ValueError, match="Too many"):
            states(spelled(most + 1))
        with pytest.raises(InvalidRequest, match=f"^bad_words are {most + 1} tokens"):
            check_runner_limits(load(), limits, params(most + 1), (), LETTERS)

    def test_it_counts_the_words_itself(self) -> None:
        made = asked(bad_words=tuple(map(str, range(200))))
        with pytest.raises(InvalidRequest, match="Too many bad words") as caught:
            check_runner_limits(load(), compat.newer_runner_limits(), made, (), LETTERS)
        assert caught.value.param == "bad_words"
