"""What is refused before vLLM computes it; `vllm_live/test_sampling.py` asks vLLM itself."""

from __future__ import annotations

from typing import Any

import pytest

from handlers.backends.vllm.sampling import check_prompt_logprobs
from handlers.errors import InvalidRequest
from handlers.request import RequestSampling


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
    def test_as_many_as_take_little_time_are_made(self, params: dict[str, Any], tokens: int, answers: int) -> None:
        check_prompt_logprobs(RequestSampling(**params), tokens, answers)
        if params:
            with pytest.raises(InvalidRequest, match=r"^prompt_logprobs is .*; allowed: \d+ probabilities"):
                check_prompt_logprobs(RequestSampling(**params), tokens + 1, answers)

    def test_the_refusal_says_what_counts(self) -> None:
        with pytest.raises(InvalidRequest) as caught:
            check_prompt_logprobs(RequestSampling(prompt_logprobs=20, stop=("x",)), 4000, 3)
        assert str(caught.value) == (
            "prompt_logprobs is 20, for a prompt of 4000 tokens and 3 answers; "
            "allowed: 13107 probabilities in all where there are stop strings"
        )
