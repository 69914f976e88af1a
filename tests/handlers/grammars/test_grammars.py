"""Clients' grammars are compiled where they can do no harm, and what cannot be used says why."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Coroutine
from typing import Any

import jsonschema
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import Vocabulary
from engine.guidance import GrammarError, Guidance
from handlers.errors import InvalidRequest, Unavailable
from handlers.grammars.compiler import GrammarCompiler, Worker
from handlers.grammars.messages import Job
from handlers.grammars.source import grammar_of
from handlers.request import Constraint
from tests.support.live import children_running
from tests.support.models import VOCAB, make_tokenizer

TOKENIZER = make_tokenizer().backend_tokenizer
VOCABULARY = Vocabulary(TOKENIZER.to_str(), TOKENIZER.get_vocab_size(), VOCAB, (257,), (259,))
GUIDANCE = Guidance(VOCABULARY)


def schema(value: Any, **fields: Any) -> Constraint:
    return Constraint("json_schema", json.dumps(value), **fields)


def matches(constraint: Constraint, text: str) -> bool:
    """Whether the whole text can be said under the constraint."""
    (guide,) = GUIDANCE.build(grammar_of(constraint.kind, constraint.value, constraint.whitespace_pattern), 1)
    ids = TOKENIZER.encode(text).ids
    return guide.matcher.try_consume_tokens(ids) == len(ids) and guide.matcher.is_accepting()


def workers() -> list[psutil.Process]:
    """The processes of ours that compile, among others that the tests share."""
    return children_running(os.getpid(), "handlers.grammars.worker")


def compiling(work: Callable[[GrammarCompiler], Coroutine[Any, Any, None]], timeout: float = 20.0) -> None:
    async def run() -> None:
        compiler = GrammarCompiler(VOCABULARY, timeout)
        try:
            await work(compiler)
        finally:
            await compiler.close()

    asyncio.run(run())
    assert not workers()


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (Constraint("json_object"), '{"a": [1, {"b": null}]}', "[1]"),
        (schema({"type": "array", "items": {"type": "integer", "minimum": -3}}), "[-3,\n  70]", "[-4]"),
        (schema({"type": "array", "uniqueItems": False}), "[1, 1]", "{}"),
        (schema({"type": "string", "format": "password"}), '"x"', "1"),
        (schema({"properties": {"format": {"const": 1}}, "type": "object"}), '{"format":1}', '{"format":2}'),
        (schema({"x-guidance": {"lenient": True, "whitespace_pattern": "x"}, "type": "array"}), "[ ]", "[x]"),
        (schema({"type": "array"}, whitespace_pattern=""), "[1,2]", "[1, 2]"),
        (schema({"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}}), "null", "1"),
        (schema({"type": "integer", "minimum": 2**62 + 1, "maximum": 2**63}), str(2**62 + 1024), str(2**62)),
        (schema({"type": "integer", "maximum": 2**63 - 1}), str(2**63 - 1024), str(2**63)),
        (
            schema({"type": "integer", "minimum": -(2**63), "maximum": -(2**60) - 1}),
            str(-(2**61)),
            str(-(2**60)),
        ),
        (schema({"type": "integer", "minimum": -(10**30)}), "-7", "x"),
        (schema({"enum": [2**53, -(2**53), 0.1]}), str(-(2**53)), str(2**53 + 1)),
        (Constraint("regex", "^a|[0-9]{2}$"), "42", "421"),
        (Constraint("regex", r"\d+ €"), "3 €", "3"),
        (Constraint("choice", json.dumps(["a", "ab", "(a)*.{2}^$&~#-"])), "(a)*.{2}^$&~#-", "aa"),
        (Constraint("choice", json.dumps(["a", "ab"])), "ab", "b"),
        (Constraint("choice", json.dumps(["line\nend", " é/\\"])), " é/\\", "line"),
        (Constraint("grammar", 'root ::= "a" x\nx ::= [b-d]+ | "é"'), "abd", "ae"),
        (Constraint("grammar", '?start: n ("+" n)*\nn: /[0-9]+/'), "1+22", "1+"),
    ],
)
def test_what_a_constraint_means(constraint: Constraint, good: str, bad: str) -> None:
    assert matches(constraint, good)
    assert not matches(constraint, bad)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("date-time", "2026-11-21T13:14:15Z", "2026-11-21 13:14"),
        ("time", "13:14:15Z", "13h"),
        ("date", "2026-11-21", "2026-13-21"),
        ("duration", "P1DT2H", "1 day"),
        ("email", "a@b.example", "a.example"),
        ("hostname", "a.example", "-a-"),
        ("ipv4", "127.0.0.1", "127.0.0.256"),
        ("ipv6", "2001:db8::1", "2001:db8"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", "123e4567"),
        ("uri", "https://a.example/b?c#d", "no uri"),
    ],
)
def test_formats_that_hold(name: str, good: str, bad: str) -> None:
    constraint = schema({"type": "string", "format": name})
    assert matches(constraint, json.dumps(good))
    assert not matches(constraint, json.dumps(bad))


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8), min_size=1))
@settings(max_examples=40, deadline=None)
def test_any_choice_can_be_said(choices: list[str]) -> None:
    constraint = Constraint("choice", json.dumps(choices))
    assert all(matches(constraint, choice) for choice in choices)


def test_white_space_inside_json_is_bounded() -> None:
    wide = schema({"type": "array"})
    assert matches(wide, "[\n" + " " * 32 + "1\n]")
    assert not matches(wide, "[\n" + " " * 33 + "1\n]")
    assert not matches(wide, "[\n\n1]")


def test_indented_json_of_pythons_own_can_be_said() -> None:
    value = {"a": [{"b": {"c": [1, 2.5, "x\n"]}}], "d": {}}
    constraint = Constraint("json_object")
    for dumped in (json.dumps(value), json.dumps(value, indent=4), json.dumps(value, separators=(",", ":"))):
        assert matches(constraint, dumped)


UNUSABLE = [
    (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    (schema({"not": {"type": "string"}}), "not"),
    (schema({"if": {}, "then": {}}), "if"),
    (schema({"contains": {"const": 1}}), "contains"),
    (schema({"propertyNames": {"pattern": "a"}}), "propertyNames"),
    (schema({"unevaluatedProperties": False}), "unevaluatedProperties"),
    (schema({"unevaluatedItems": False}), "unevaluatedItems"),
    (schema({"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 9}]}), "oneOf"),
    (schema({"type": "thing"}), "thing"),
    (schema({"$ref": "http://127.0.0.1:9/x"}), "127.0.0.1:9"),
    (schema({"$ref": "file:///etc/passwd"}), "etc/passwd"),
    (schema({"$ref": "#/$defs/none"}), "none"),
    (schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "a $ref may lead back to itself"),
    (
        schema({"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]}),
        "no text can satisfy it",
    ),
    (schema({"type": "integer", "minimum": 4, "maximum": 3}), "minimum"),
    (schema({"type": "integer", "minimum": 2**60 + 1, "maximum": 2**60 + 3}), "minimum"),
    (schema({"type": "integer", "minimum": 10**30}), "1" + "0" * 30),
    (schema({"enum": [-(2**63)]}), str(-(2**63))),
    (schema({"const": {"a": [2**53 + 1]}}), str(2**53 + 1)),
    (schema({"const": -1e300}), "1e+300"),
    (schema({"type": "object", "required": ["a"], "additionalProperties": False}), "'a'"),
    (schema({"type": "string", "pattern": "(?=a)b"}), "look"),
    (schema({"type": "string", "pattern": "("}), "unclosed"),
    (Constraint("regex", "("), "unclosed"),
    (Constraint("regex", r"(a)\1"), "backreferences"),
    (Constraint("grammar", "start: other"), "other"),
    (Constraint("grammar", 'root ::= "a'), "end of input"),
    (Constraint("grammar", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000), "cannot be"),
    (Constraint("grammar", "start: <[259]>"), "tokens"),
]


def test_what_cannot_be_used_says_why() -> None:
    async def work(compiler: GrammarCompiler) -> None:
        for constraint, says in UNUSABLE:
            with pytest.raises(InvalidRequest) as caught:
                await compiler.compile(constraint)
            assert says in caught.value.message, constraint
            assert caught.value.param == constraint.param
            assert len(caught.value.message) < 500

    compiling(work)


def many_rules(count: int) -> str:
    rules = [f'r{i}: r{i + 1} r{i + 1} | "a"' for i in range(count)]
    return "\n".join(["start: r0", *rules, f'r{count}: "b"'])


HOSTILE = [
    Constraint("grammar", many_rules(5000)),  # overflows the compiler's stack
    Constraint("regex", "(abc){1000000}"),
    Constraint("regex", r"(\pL|\pN|\w|\W)*" * 3000),
    Constraint("regex", "(" * 50_000 + "a" + ")" * 50_000),
    Constraint("regex", "((((a{0,1000}){0,1000}){0,1000}){0,1000})"),
    schema({"allOf": [{"type": "string", "pattern": f"(.*{chr(97 + i)}){{10}}"} for i in range(20)]}),
    schema({"allOf": [{"anyOf": [{"const": f"{i}{j}"} for j in range(10)]} for i in range(20)]}),
]


def test_a_hostile_grammar_is_refused_and_the_event_loop_goes_on() -> None:
    """Minutes of work, gigabytes, a stack overflow: each ends as a 4xx, and the next one is compiled as ever."""

    async def work(compiler: GrammarCompiler) -> None:
        await compiler.compile(Constraint("json_object"))
        late = 0.0
        done = asyncio.Event()

        async def beat() -> None:
            nonlocal late
            while not done.is_set():
                before = time.thread_time()
                await asyncio.sleep(0)
                late = max(late, time.thread_time() - before)
                await asyncio.sleep(0.01)

        heart = asyncio.create_task(beat())
        for constraint in HOSTILE:
            with pytest.raises(InvalidRequest):
                await compiler.compile(constraint)
        assert await compiler.compile(Constraint("regex", "[ab]"))
        done.set()
        await heart
        assert late < 0.2

    compiling(work, timeout=3.0)


def test_a_time_limit_really_ends_the_work() -> None:
    slow = HOSTILE[5]

    async def work(compiler: GrammarCompiler) -> None:
        with pytest.raises(InvalidRequest, match="guided_decoding_timeout"):
            await compiler.compile(slow)
        with pytest.raises(InvalidRequest, match="guided_decoding_timeout"):
            await compiler.compile(slow)  # not remembered: the machine may only have been busy

    compiling(work, timeout=0.001)


def test_the_same_is_compiled_once_however_many_ask() -> None:
    async def work(compiler: GrammarCompiler) -> None:
        constraint = schema({"type": "array", "items": {"enum": ["a", "b"]}})
        asking = [asyncio.create_task(compiler.compile(constraint)) for _ in range(20)]
        await asyncio.sleep(0)
        asking[0].cancel()  # a client that leaves does not end it for the others
        done = await asyncio.gather(*asking, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError)
        assert len(set(map(str, done[1:]))) == 1
        (worker,) = workers()
        worker.kill()
        while psutil.pid_exists(worker.pid):  # noqa: ASYNC110 - another process, seen only by looking
            await asyncio.sleep(0.01)
        assert await compiler.compile(constraint) == done[1]
        assert not workers(), "nothing was compiled again"

    compiling(work)


def test_a_worker_that_dies_is_replaced() -> None:
    async def work(compiler: GrammarCompiler) -> None:
        await compiler.compile(Constraint("regex", "a"))
        (worker,) = workers()
        worker.kill()
        while psutil.pid_exists(worker.pid):  # noqa: ASYNC110 - another process, seen only by looking
            await asyncio.sleep(0.01)
        assert await compiler.compile(Constraint("regex", "b"))

    compiling(work)


def test_grammars_for_a_schema_hold_the_schema() -> None:
    """And so every text that matches validates; the engine's own tests draw such texts."""
    wanted = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    for text in ('{"a": 1}', '{"a":-20}', '{"a":1.5}', '{"a":1,"b":2}', "{}", '{"a":"1"}', "[]"):
        try:
            jsonschema.validate(json.loads(text), wanted)
        except jsonschema.ValidationError:
            assert not matches(schema(wanted), text)
        else:
            assert matches(schema(wanted), text)


def test_a_broken_tokenizer_is_said_at_once() -> None:
    with pytest.raises(GrammarError, match="tokenizer"):
        Guidance(Vocabulary("{}", 10, 10))


def test_a_worker_that_is_ended_within_a_long_reply_holds_nobody_up() -> None:
    async def run() -> None:
        worker = Worker("tests.support.long_reply_worker")
        await worker.start(VOCABULARY)
        child = worker._child
        assert child is not None
        asking = asyncio.create_task(worker.ask(Job("regex", "20000000", None)))
        while not child._message:  # noqa: ASYNC110  the first part of the reply
            await asyncio.sleep(0)
        asking.cancel()
        async with asyncio.timeout(60):
            await worker.end()
        assert not worker.alive
        assert not psutil.pid_exists(child.pid)

    asyncio.run(run())


def test_what_a_worker_prints_is_logged(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    async def run() -> None:
        compiler = GrammarCompiler(Vocabulary("{}", 10, 10), 20)
        try:
            with pytest.raises(Unavailable):
                await compiler.compile(Constraint("json_object"))
        finally:
            await compiler.close()

    asyncio.run(run())
    assert not workers()
    printed = [record.getMessage() for record in caplog.records if record.name == "processes.grammars"]
    assert any("GrammarError: this tokenizer does not support constrained output" in line for line in printed), printed
    assert capfd.readouterr() == ("", "")
