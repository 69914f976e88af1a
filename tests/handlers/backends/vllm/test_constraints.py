"""Clients' constraints in the words that vLLM is given; no vLLM is needed."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, grammar_from

from handlers.backends.base import Capabilities, PromptModel
from handlers.backends.model_text import ModelText
from handlers.backends.vllm.sampling import choose_library, constraint_for_vllm, constraint_vocabulary
from handlers.errors import InvalidRequest
from handlers.pipeline import Pipeline
from handlers.prompts.chat_templates import ChatTemplates
from handlers.request import Constraint
from properties.settings import Settings
from tests.support.models import VOCAB, make_tokenizer

TOKENIZER = make_tokenizer()
BYTES = LLTokenizer("byte")
ARRAY = Constraint("json_schema", json.dumps({"type": "array", "items": {"type": "integer"}}))


def checked(constraint: Constraint, library: str = "guidance", *, compact: bool = False) -> Constraint:
    async def nothing() -> None:
        pass

    async def run() -> Constraint | None:
        ends = SimpleNamespace(eos_token_id=257)
        text = ModelText(Settings(), Path("nowhere"), TOKENIZER, ChatTemplates(), ends, VOCAB)
        vocabulary = constraint_vocabulary(SimpleNamespace(backend=library), text)
        model = PromptModel(
            TOKENIZER,
            text.renderer,
            VOCAB,
            ThreadPoolExecutor(1),
            vocabulary,
            json_whitespace="" if compact else None,
        )
        engine: Any = SimpleNamespace(close=nothing, model=model, capabilities=Capabilities(64, images=False))
        pipeline = Pipeline(engine, 20.0)
        try:
            meant, grammar = await pipeline.compiled(constraint)
        finally:
            await pipeline.close()
        assert meant is not None
        return meant if grammar is None else constraint_for_vllm(meant, grammar)

    found = asyncio.run(run())
    assert found is not None
    return found


def said(constraint: Constraint, text: str) -> bool:
    """Whether vLLM's own way to llguidance lets the whole text be said."""
    assert constraint.value is not None
    if constraint.kind == "json_schema":
        grammar = LLMatcher.grammar_from_json_schema(constraint.value, defaults={"whitespace_flexible": True})
    else:
        grammar = grammar_from("grammar", constraint.value)
    matcher = LLMatcher(BYTES, grammar)
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (Constraint("json_object"), '{"a": [1, null]}', "[]"),
        (ARRAY, "[1, 2]", "[1,     2]"),
        (replace(ARRAY, whitespace_pattern=""), "[1,2]", "[1, 2]"),
        (replace(ARRAY, whitespace_pattern="[ ]?"), "[1, 2]", "[1,  2]"),
        (replace(ARRAY, whitespace_pattern=" |\n"), "[1,\n2]", "[1\n\n,2]"),
        (Constraint("regex", r"\d+ €"), "3 €", "3"),
        (Constraint("choice", json.dumps(["a", "(b)*{"])), "(b)*{", "b"),
        (Constraint("grammar", 'root ::= "a" | "b"'), "b", "c"),
        (Constraint("grammar", '?start: n ("+" n)*\nn: /[0-9]+/'), "1+22", "1+"),
        (Constraint("grammar", 'start[capture]: "a"'), "a", "b"),
    ],
)
def test_vllm_reads_a_constraint_as_the_embedded_engine_does(constraint: Constraint, good: str, bad: str) -> None:
    found = checked(constraint)
    assert said(found, good)
    assert not said(found, bad)
    assert found.param == constraint.param


def test_without_white_space_where_the_operator_wants_none() -> None:
    assert said(checked(ARRAY, compact=True), "[1,2]")
    assert not said(checked(ARRAY, compact=True), "[1, 2]")


def test_what_cannot_be_compiled_is_refused_before_vllm_sees_it() -> None:
    with pytest.raises(InvalidRequest, match="response_format cannot be used"):
        checked(Constraint("regex", "(a"))


def test_another_library_gets_what_the_client_wrote() -> None:
    broken = Constraint("regex", "(a")
    assert checked(broken, "xgrammar") is broken


def test_another_library_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    checked(ARRAY, "xgrammar")
    assert "xgrammar looks at clients' schemas and grammars on the event loop" in caplog.text
    caplog.clear()
    checked(ARRAY)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("named", "mode", "tokenizer", "chosen"),
    [
        ("auto", "auto", TOKENIZER, "guidance"),
        ("auto", "mistral", TOKENIZER, "auto"),
        ("auto", "auto", object(), "auto"),
        ("outlines", "auto", TOKENIZER, "outlines"),
    ],
)
def test_the_library_is_the_embedded_engines_unless_one_is_named(
    named: str, mode: str, tokenizer: object, chosen: str
) -> None:
    arguments = SimpleNamespace(structured_outputs_config=SimpleNamespace(backend=named), tokenizer_mode=mode)
    choose_library(arguments, tokenizer)
    assert arguments.structured_outputs_config.backend == chosen
