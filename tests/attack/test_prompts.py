"""Fields and prompts that are made to cost much once their body is read: no step of it stops the event loop long."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from handlers.errors import InvalidRequest
from handlers.prompts.renderer import PromptRenderer
from handlers.prompts.special_tokens import SEARCH_WINDOW
from handlers.protocols.errors import own_words
from handlers.request import ChatPrompt, Message, TextPart, TextPrompt
from tests.attack.sending import TRIES
from tests.support.pace import too_long
from tests.support.scripted import ScriptedBackend, incoming, said, service

M = 10**6
MOST_STALL = 0.05
"""Seconds of CPU time, in the best of `TRIES`."""


# Fields

_MESSAGE: dict[str, Any] = {"role": "user", "content": "a"}
_LONG = "a" * (20 * M)
FIELDS: dict[str, tuple[dict[str, Any], int]] = {
    "choices": ({"guided_choice": [f"a{n}" for n in range(400_000)]}, 400),
    "an enumeration": ({"guided_json": {"enum": ["a"] * 400_000}}, 400),
    "a pattern": ({"guided_regex": _LONG}, 400),
    "biases": ({"logit_bias": {str(n): 1 for n in range(100_000)}}, 400),
    "words": ({"bad_words": [_LONG]}, 400),
    "breakers": ({"dry_sequence_breakers": _LONG}, 400),
    "numbers written as floats": ({"stop_token_ids": [1.0] * 500_000}, 400),
    "variables": ({"chat_template_kwargs": {f"k{n}": 1 for n in range(100_000)}}, 200),
    "keys of a message": ({"messages": [{**_MESSAGE, **{f"k{n}": "b" for n in range(100_000)}}]}, 200),
    "a role": ({"messages": [{"role": _LONG, "content": "a"}]}, 400),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_no_field_however_large_stops_the_others_for_long(kind: str) -> None:
    fields, status = FIELDS[kind]

    async def ask() -> tuple[int, float]:
        asked = incoming({"messages": [_MESSAGE], **fields})
        subject = service(ScriptedBackend(said("a"), structured_outputs=True))
        stall = 0.0

        async def tick() -> None:
            nonlocal stall
            last = time.process_time()
            while True:
                await asyncio.sleep(0.001)
                now = time.process_time()
                stall, last = max(stall, now - last), now

        ticks = asyncio.create_task(tick())
        await asyncio.sleep(0)
        reply = await subject.answer(asked)
        await asyncio.sleep(0.01)
        ticks.cancel()
        return reply.status, stall

    def measured() -> float:
        gc.freeze()
        try:
            got, stall = asyncio.run(ask())
        finally:
            gc.unfreeze()
        assert got == status
        return stall

    own_words()  # looked up once, when a server starts
    _bounded(kind, measured)


def _bounded(kind: str, measured: Callable[[], float]) -> None:
    for left in reversed(range(TRIES)):
        stall = measured()
        print(f"{kind}: {stall * 1000:.0f} ms of CPU time")
        if not too_long(stall, MOST_STALL):
            return
        assert left, f"the event loop stopped for {stall * 1000:.0f} ms of CPU time"


# Prompts


def _chat(*texts: str) -> ChatPrompt:
    return ChatPrompt([Message("user", [TextPart(text)], True) for text in texts])


PROMPTS: dict[str, Callable[[], ChatPrompt | TextPrompt]] = {
    "half a control token, often": lambda: _chat("<" * M),
    "control tokens": lambda: _chat("<image>" * 50_000),
    "words": lambda: _chat("a b " * (M // 4)),
    "messages": lambda: _chat(*["a"] * 4096),
    "token ids": lambda: TextPrompt([], token_ids=[5] * (M // 2)),
    "arguments": lambda: ChatPrompt(
        [Message("assistant", [], tool_calls=[{"function": {"arguments": json.dumps(["x"] * 200_000)}}])]
    ),
}


def _renderer(search_window: int = SEARCH_WINDOW) -> PromptRenderer:
    tokenizer = AutoTokenizer.from_pretrained("examples/shapes")
    template = Path("examples/shapes/chat_template.jinja").read_text()
    rendering = PromptRenderer(tokenizer, template, "auto", "<image>", search_window=search_window)
    rendering.longest = 2**22
    return rendering


@pytest.fixture(scope="module")
def renderer() -> PromptRenderer:
    return _renderer()


@pytest.mark.parametrize("kind", PROMPTS)
def test_rendering_a_prompt_in_a_thread_never_stops_the_others_for_long(renderer: PromptRenderer, kind: str) -> None:
    _bounded(kind, lambda: asyncio.run(_stall_beside(renderer.render, PROMPTS[kind]())))


async def _stall_beside(work: Callable[..., object], *given: object) -> float:
    """The most CPU time that the process takes between two ticks of the event loop while a thread works."""
    longest, last = 0.0, time.process_time()
    gc.freeze()
    try:
        task = asyncio.create_task(asyncio.to_thread(work, *given))
        while not task.done():
            await asyncio.sleep(0.001)
            now = time.process_time()
            longest, last = max(longest, now - last), now
        await task
    finally:
        gc.unfreeze()
    return longest


@pytest.mark.parametrize("field", ["tool_calls", "reasoning", "name", "chat_template_kwargs", "tools", "template"])
def test_all_that_a_template_may_print_counts_towards_the_longest_prompt(renderer: PromptRenderer, field: str) -> None:
    prompt, text = _chat("a"), "a" * (2**22)
    (message,) = prompt.messages
    if field == "tool_calls":
        message.tool_calls = [{"function": {"name": "a", "arguments": {"b": [text]}}}]
    elif field == "reasoning":
        message.reasoning = text
    elif field == "name":
        message.name = text
    elif field == "chat_template_kwargs":
        prompt.template_kwargs = {"documents": [{"text": text}]}
    elif field == "tools":
        prompt.tools = [{"type": "function", "function": {"name": "a", "description": text}}]
    else:
        prompt.template = text
    with pytest.raises(InvalidRequest, match=r"the prompt has 419\d{4} characters"):
        renderer.render(prompt)


def test_too_many_tokens_are_refused_before_they_are_listed(renderer: PromptRenderer) -> None:
    with pytest.raises(InvalidRequest, match=r"the prompt has 11000.. tokens.* at most 1048576"):
        renderer.render(_chat("a" * 1_100_000))


@pytest.mark.parametrize("window", [1, 7, 2**17])
def test_control_tokens_are_hidden_and_restored_across_any_border(renderer: PromptRenderer, window: int) -> None:
    draw = random.Random(window)
    words = ["<image>", "<ima", "ge>", "<", ">", "a", " ", "</s>", "<pad>"]
    texts = ["".join(draw.choices(words, k=draw.randint(0, 30))) for _ in range(100)]
    in_windows = _renderer(window)
    for text in texts:
        before, found = renderer.render(_chat(text, text)), in_windows.render(_chat(text, text))
        assert (found.text, found.token_ids) == (before.text, before.token_ids)
        assert found.text.count(text) >= 2 * bool(text)
