"""Tokens to an answer's text, the same for every backend: where it begins, and what vLLM's outputs become."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.messages import Logprobs
from handlers.backends.base import EngineRequest, TokenOutput
from handlers.backends.vllm.outputs import VllmStream
from handlers.deltas import Delta, PromptStats
from handlers.errors import EngineFailed
from handlers.pipeline import Generation, texts_of
from handlers.prompts.tokenizer import TokenTexts
from handlers.request import (
    ChatPrompt,
    Constraint,
    GenerationRequest,
    Message,
    Prompt,
    RequestSampling,
    TextPart,
    TextPrompt,
)

WORDS = ["▁a", "▁red", "▁circle", "s", "</s>", "▁"]
A, RED, CIRCLE, S, END, SPACE = range(len(WORDS))
SAID = [Message("user", [TextPart("hi")])]


def tokenizer() -> PreTrainedTokenizerFast:
    """A word's space belongs to its token, and a text's first space is nobody's: as with sentencepiece."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="▁"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize(
    ("prompt", "constraint", "text"),
    [
        (ChatPrompt(SAID), None, "red circle"),
        (ChatPrompt(SAID, continue_final_message=True, add_generation_prompt=False), None, " red circle"),
        (ChatPrompt(SAID), Constraint("regex", " red.*"), " red circle"),
        (TextPrompt([TextPart("a")]), None, " red circle"),
    ],
)
def test_only_a_chats_answer_begins_anew(prompt: Prompt, constraint: Constraint | None, text: str) -> None:
    request = GenerationRequest("r", prompt, RequestSampling(), constraint=constraint)
    for one in texts_of(request, request.sampling, [A], 2, TokenTexts(tokenizer())):
        assert "".join(one.pieces([RED, CIRCLE], finished=True)) == text


@pytest.mark.parametrize("impossible", [float("-inf"), float("nan"), -1e9])
def test_an_impossible_token_has_a_log_probability_that_json_can_hold(impossible: float) -> None:
    class Stream:
        async def __aiter__(self) -> AsyncIterator[TokenOutput]:
            yield TokenOutput(0, [RED], "stop", [Logprobs([RED, A], [impossible, -0.5], [2, 1])])

        def abort(self, index: int) -> None:
            raise AssertionError

        async def aclose(self) -> None:
            pass

    async def answer() -> list[Delta]:
        sampling = RequestSampling(logprobs=1)
        texts = [TokenTexts(tokenizer()).detokenizer(sampling)]
        generation = Generation(Stream(), PromptStats(1), sampling, texts, 1, str)
        return [delta async for delta in generation]

    (delta,) = asyncio.run(answer())
    assert delta.logprobs is not None
    assert (delta.logprobs[0].chosen.logprob, delta.logprobs[0].top[0].logprob) == (-9999.0, -0.5)


def output(
    *token_ids: int, index: int = 0, reason: str | None = None, stop: int | str | None = None
) -> SimpleNamespace:
    """vLLM's, as far as it is read. Its text is not."""
    completion = SimpleNamespace(
        index=index, token_ids=list(token_ids), text="not read", logprobs=None, finish_reason=reason,
        stop_reason=stop,
    )  # fmt: skip
    return SimpleNamespace(outputs=[completion], finished=reason is not None, num_cached_tokens=0, prompt_logprobs=None)


def deltas(*outputs: SimpleNamespace, n: int = 1, **params: Any) -> tuple[list[Delta], bool]:
    """What becomes of vLLM's outputs, and whether vLLM was told, before it had finished, that no more are wanted."""
    told: list[bool] = []

    async def given() -> AsyncGenerator[SimpleNamespace, None]:
        for one in outputs:
            try:
                yield one
            except GeneratorExit:
                told.append(not one.finished)
                raise

    async def all_of_them() -> list[Delta]:
        sampling = RequestSampling(**params)
        request = GenerationRequest("r", ChatPrompt(SAID), sampling, n=n)
        stream = VllmStream(
            given(),
            EngineRequest("r", sampling, n),
            images=False,
            eos_token_ids=[END],
            failure=lambda error, begun: EngineFailed(str(error)),
            ended=lambda stream: None,
        )
        await stream.start()
        texts = texts_of(request, sampling, [A], n, TokenTexts(tokenizer()))
        generation = Generation(stream, PromptStats(1), sampling, texts, 1, str)
        return [delta async for delta in generation]

    return asyncio.run(all_of_them()), any(told)


def test_each_token_has_its_own_text_however_many_vllm_hands_over_at_once() -> None:
    one_by_one, _ = deltas(output(RED), output(CIRCLE), output(END, reason="stop"))
    (together,), _ = deltas(output(RED, CIRCLE, END, reason="stop"))
    assert [piece for delta in one_by_one for piece in delta.pieces] == ["red", " circle", ""]
    assert list(together.pieces) == ["red", " circle", ""]
    assert (together.text, together.finish_reason, together.stop_reason, together.eos) == (
        "red circle", "stop", None, True,
    )  # fmt: skip


def test_a_stop_tokens_text_is_left_out_unless_it_is_wanted() -> None:
    for include, text in ((False, "red"), (True, "red circle")):
        (delta,), _ = deltas(
            output(RED, CIRCLE, reason="stop", stop=CIRCLE),
            stop_token_ids=[CIRCLE],
            include_stop_str_in_output=include,
        )
        assert (delta.text, delta.finish_reason, delta.stop_reason, delta.eos) == (
            text, "stop", CIRCLE, False,
        )  # fmt: skip


def test_a_stop_string_ends_the_answer_when_vllm_finds_it_and_when_it_does_not() -> None:
    for end, told in ((output(CIRCLE, S, reason="stop", stop="circles"), False), (output(CIRCLE, S), True)):
        found, stopped = deltas(output(RED), end, output(A), stop=["circles"])
        last = found[-1]
        assert "".join(delta.text for delta in found) == "red "
        assert (last.finish_reason, last.stop_reason, last.eos) == ("stop", "circles", False)
        assert stopped is told


def test_a_choice_that_fails_ends_the_others() -> None:
    told: list[bool] = []

    async def given() -> AsyncGenerator[SimpleNamespace, None]:
        try:
            yield output(RED, index=1)
            yield SimpleNamespace(**{**vars(output(reason="error")), "finished": False})
        except GeneratorExit:
            told.append(True)
            raise

    async def read() -> None:
        sampling = RequestSampling(temperature=1.0)
        request = GenerationRequest("r", ChatPrompt(SAID), sampling, n=2)
        stream = VllmStream(
            given(),
            EngineRequest("r", sampling, 2),
            images=False,
            eos_token_ids=[END],
            failure=lambda error, begun: EngineFailed(str(error)),
            ended=lambda stream: None,
        )
        await stream.start()
        texts = texts_of(request, sampling, [A], 2, TokenTexts(tokenizer()))
        generation = Generation(stream, PromptStats(1), sampling, texts, 1, str)
        with pytest.raises(EngineFailed):
            async for _ in generation:
                pass
        assert told, "vLLM was told before anything is collected"

    asyncio.run(read())


def test_a_stop_string_may_begin_with_the_space_between_prompt_and_answer() -> None:
    """vLLM knows the prompt when it looks for stop strings, and ends the answer here."""
    (delta,), _ = deltas(output(RED, reason="stop", stop=" red"), stop=[" red"])
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("", "stop", " red")


def test_text_held_back_for_a_stop_string_comes_with_the_end() -> None:
    found, _ = deltas(output(RED), output(CIRCLE), output(END, reason="stop"), stop=["circles"])
    assert [delta.text for delta in found] == ["red", " ", "circle"]
    aborted, _ = deltas(output(RED), output(CIRCLE), output(reason="abort"), stop=["circles"])
    assert [delta.text for delta in aborted] == ["red", " ", "circle"]
    assert aborted[-1].finish_reason == "abort"


def test_of_several_answers_each_has_its_own_text_and_end() -> None:
    first_done = output(CIRCLE, S)
    found, stopped = deltas(
        output(RED), output(A, index=1), first_done, output(CIRCLE), output(CIRCLE, S, index=1), n=2,
        stop=["circles"],
    )  # fmt: skip
    assert [(delta.index, delta.text) for delta in found] == [(0, "red"), (1, "a"), (0, " "), (1, " ")]
    assert [delta.finish_reason for delta in found] == [None, None, "stop", "stop"]
    assert stopped
