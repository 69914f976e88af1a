"""What models write, cut at every position: the pieces must not depend on the cut, and no text may be lost."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.parsers.base import (
    CallArguments,
    CallBroken,
    CallStart,
    Content,
    Parser,
    ParserContext,
    Piece,
    Reasoning,
    joined,
)
from handlers.parsers.json_scanner import JsonScanner, is_object
from handlers.parsers.reasoning import ReasoningThenCalls
from handlers.parsers.select import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    named_parser,
    openai_call_id,
    required_parser,
)
from tests.support.pace import too_long

NAMES = ("get_weather", "search", "geo.locate", "now")
ASKED = ParserContext(tools=[{"type": "function", "function": {"name": name}} for name in NAMES])

Make = Callable[[], Parser]


def calls(name: str) -> Make:
    return lambda: TOOL_FORMATS[name].parser(ASKED)


def parsed(parser: Parser, parts: Iterable[str]) -> list[Piece]:
    """The pieces, joined, and with the random ids taken out."""
    found = [piece for part in parts for piece in parser.push(part)] + parser.finish()
    return [replace(p, id="") if isinstance(p, CallStart) else p for p in joined(found)]


def cut_everywhere(make: Make, text: str) -> list[Piece]:
    whole = parsed(make(), [text])
    for at in range(1, len(text)):
        assert parsed(make(), [text[:at], text[at:]]) == whole, (text[:at], text[at:])
    assert parsed(make(), text) == whole
    for size in (2, 3, 5, 7):
        assert parsed(make(), re.findall(rf"(?s).{{1,{size}}}", text)) == whole
    return whole


def shown(pieces: list[Piece]) -> dict[str, Any]:
    """A whole reply: its content, reasoning and calls."""
    content, reasoning = "", ""
    called: dict[int, list[str]] = {}
    for piece in pieces:
        match piece:
            case Content(text):
                content += text
            case Reasoning(text):
                reasoning += text
            case CallStart(index, _, name):
                called[index] = [name, ""]
            case CallArguments(index, text):
                called[index][1] += text
            case CallBroken(index, text):
                del called[index]
                content += text
    found: dict[str, Any] = {}
    if content:
        found["content"] = content
    if reasoning:
        found["reasoning"] = reasoning
    if called:
        found["calls"] = [(name, json.loads(text) if is_object(text) else text) for name, text in called.values()]
    return found


WEATHER = {"city": 'Köln "Nord" {a} [b]', "days": [1, -2.5e3, True, None], "at": {"lat": 50.9, "tags": []}}
ESCAPED = json.dumps(WEATHER)
PLAIN = json.dumps(WEATHER, ensure_ascii=False)
PYTHON = r"""city='Köln "Nord" {a} [b]', days=[1, -2.5e3, True, None], at={"lat": 50.9, 'tags': []}"""
CALL = ("get_weather", WEATHER)
SEARCH = ("search", {"q": "a\nb 😀"})

RECORDED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "hermes": [
        ("Just an answer.\n", {"content": "Just an answer.\n"}),
        (
            f'<tool_call>\n{{"name": "get_weather", "arguments": {PLAIN}}}\n</tool_call>',
            {"calls": [CALL]},
        ),
        (
            f'I look.\n<tool_call>{{"arguments": {ESCAPED}, "name": "get_weather"}}</tool_call>\n'
            '<tool_call>\n{"name": "search", "arguments": {"q": "a\\nb \\ud83d\\ude00"}}\n</tool_call>\nDone? Yes.',
            {"content": "I look.\n\nDone? Yes.", "calls": [CALL, SEARCH]},
        ),
        ('<tool_call>{"name": "now"}</tool_call>', {"calls": [("now", {})]}),
        ('<tool_call>{"name": "now", "arguments": null}</tool_call>', {"calls": [("now", {})]}),
        ('<tool_call>{"name": "search", "arguments": "{\\"q\\": 1}"}</tool_call>', {"calls": [("search", {"q": 1})]}),
        # A raw line feed in a string, a missing end tag, and the answer's end in the middle.
        ('<tool_call>{"name": "search", "arguments": {"q": "a\nb 😀"}}', {"calls": [SEARCH]}),
        ('<tool_call>{"name": "search", "arguments": {"q": "a', {"calls": [("search", '{"q": "a')]}),
        ('<tool_call>{"name": "search", "arg', {"content": '<tool_call>{"name": "search", "arg'}),
        ('<tool_call>{"name": "now"}</tool_c', {"calls": [("now", {})]}),
        ("a <tool_ca", {"content": "a <tool_ca"}),
        # Malformed.
        ("<tool_call>print(1)</tool_call>", {"content": "<tool_call>print(1)</tool_call>"}),
        ('<tool_call>{"name": 1}</tool_call>', {"content": '<tool_call>{"name": 1}</tool_call>'}),
        ('<tool_call>{"name": "a", "arguments": [1]}', {"content": '<tool_call>{"name": "a", "arguments": [1]}'}),
        ('<tool_call>{"name": "\\ud800"}', {"content": '<tool_call>{"name": "\\ud800"}'}),
        ('<tool_call>{"arguments": {}}', {"content": '<tool_call>{"arguments": {}}'}),
        ("<tool_call><tool_call>{}", {"content": "<tool_call><tool_call>{}"}),
        (
            '<tool_call>{"name": "search", "arguments": {"q": oops}}</tool_call> x <tool_call>{"name":"now"}',
            {
                "content": '<tool_call>{"name": "search", "arguments": {"q": oops}}</tool_call> x ',
                "calls": [("now", {})],
            },
        ),
    ],
    "llama3_json": [
        ("It is {warm}.", {"content": "It is {warm}."}),
        (f'{{"name": "get_weather", "parameters": {PLAIN}}}', {"calls": [CALL]}),
        (
            f'<|python_tag|>{{"name": "get_weather", "parameters": {ESCAPED}}}; '
            '{"type": "function", "name": "search", "parameters": {"q": "a\\nb 😀"}}',
            {"calls": [CALL, SEARCH]},
        ),
        (
            '\n{"name": "now", "parameters": {}}\n{"name": "now", "parameters": {}}\nok',
            {"calls": [("now", {}), ("now", {})], "content": "\nok"},
        ),
        (
            'First:\n{"name": "now", "arguments": {}} and {"name": "now", "parameters": {}}',
            {"calls": [("now", {})], "content": 'First:\n and {"name": "now", "parameters": {}}'},
        ),
        ('{"name": "Bob", "parameters": {}}', {"content": '{"name": "Bob", "parameters": {}}'}),
        ('{"name": "now"}', {"content": '{"name": "now"}'}),
        ('{"answer": {"name": "now", "parameters": {}}}', {"content": '{"answer": {"name": "now", "parameters": {}}}'}),
        ("<|python_tag|>print(1)", {"content": "<|python_tag|>print(1)"}),
        ('{"name": "now", "parameters": {}};', {"calls": [("now", {})], "content": ";"}),
        ('{"name": "search", "parameters": {"q": [1, {"a"', {"calls": [("search", '{"q": [1, {"a"')]}),
    ],
    "mistral": [
        ("[TOOL] [calls]", {"content": "[TOOL] [calls]"}),
        (
            f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ESCAPED}}}, '
            '{"name": "search", "arguments": {"q": "a\\nb 😀"}, "id": "abcdefghi"}]',
            {"calls": [CALL, SEARCH]},
        ),
        (f'Hm. [TOOL_CALLS]get_weather{PLAIN}[TOOL_CALLS]now{{}}', {"content": "Hm. ", "calls": [CALL, ("now", {})]}),
        (
            f'[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{PLAIN}[TOOL_CALLS]now[ARGS]{{}} x',
            {"calls": [CALL, ("now", {})], "content": " x"},
        ),
        ('[TOOL_CALLS]{"name": "now", "arguments": {}}', {"calls": [("now", {})]}),
        ("[TOOL_CALLS] get_weather", {"content": "[TOOL_CALLS] get_weather"}),
        ("[TOOL_CALLS]now[ARG", {"content": "[TOOL_CALLS]now[ARG"}),
        ("[TOOL_CALLS]now(1)", {"content": "[TOOL_CALLS]now(1)"}),
        ("[TOOL_CALLS][1]", {"content": "[TOOL_CALLS][1]"}),
        ('[TOOL_CALLS]now{"a": 1]', {"content": '[TOOL_CALLS]now{"a": 1]'}),
        ('[TOOL_CALLS]now{"a": [1, ', {"calls": [("now", '{"a": [1, ')]}),
        ('[TOOL_CALLS][{"name":"now","arguments":{}} ', {"calls": [("now", {})]}),
    ],
    "pythonic": [
        ("[1] is a footnote", {"content": "[1] is a footnote"}),
        ("see [now()]", {"content": "see [now()]"}),
        (f"[get_weather({PYTHON}), search(q=\"a\\nb \\U0001F600\")]", {"calls": [CALL, SEARCH]}),
        ("[now()]\nand text", {"calls": [("now", {})], "content": "\nand text"}),
        ("<|python_start|>[now(), geo.locate(x=(1, .5), y=())]<|python_end|>",
         {"calls": [("now", {}), ("geo.locate", {"x": [1, 0.5], "y": []})]}),
        ("text <|python_start|>[now()]<|python_end|>", {"content": "text ", "calls": [("now", {})]}),
        (r"""[search(q='it\'s \x41\u00e9\d', n=0x1F, m=1_000, k=007, e=-1., t=true, class=[[], {}],)]""",
         {"calls": [("search", {"q": "it's Aé\\d", "n": 31, "m": 1000, "k": 7, "e": -1.0, "t": True,
                                "class": [[], {}]})]}),
        ("[search(q='two\nlines', e='\\ud83d\\ude00')]", {"calls": [("search", {"q": "two\nlines", "e": "😀"})]}),
        ("[unknown(a=1)]", {"content": "[unknown(a=1)]"}),
        ("[search('x')]", {"content": "[search('x')]"}),
        ("[search(q=now())]", {"content": "[search(q=now())]"}),
        ("[search(q=(1))]", {"content": "[search(q=(1))]"}),
        ("[search(q=f'x')]", {"content": "[search(q=f'x')]"}),
        ("[search(q=1e999)]", {"content": "[search(q=1e999)]"}),
        ("[search(q=[1,,2])]", {"content": "[search(q=[1,,2])]"}),
        ("[search(q={1: 2})]", {"content": "[search(q={1: 2})]"}),
        ("[now(), oops(]", {"calls": [("now", {})], "content": ", oops(]"}),
        ("[search(q='a', r='b", {"calls": [("search", '{"q": "a", "r": "b')]}),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [(name, text, expected) for name, cases in RECORDED.items() for text, expected in cases],
)
def test_recorded_texts_give_the_same_calls_wherever_they_are_cut(
    name: str, text: str, expected: dict[str, Any]
) -> None:
    assert shown(cut_everywhere(calls(name), text)) == expected


@pytest.mark.parametrize(
    ("name", "of", "marks"),
    [
        ("qwen3_json", "hermes", {}),
        ("longcat", "hermes", {"<tool_call>": "<longcat_tool_call>", "</tool_call>": "</longcat_tool_call>"}),
        ("llama4_json", "llama3_json", {}),
        ("llama4_pythonic", "pythonic", {}),
    ],
)
def test_families_that_write_as_another_are_read_as_it(name: str, of: str, marks: dict[str, str]) -> None:
    whole = [(text, expected) for text, expected in RECORDED[of] if "calls" in expected]
    for text, expected in whole:
        for mark, own in marks.items():
            text = text.replace(mark, own)
        found = shown(parsed(calls(name)(), [text]))
        assert found["calls"] == expected["calls"], text


def test_long_names_and_numbers_break_at_the_same_place_wherever_they_are_cut() -> None:
    key = "k" * 590 + "<tool_call>" + "k" * 30
    for text in (f'<tool_call>{{"{key}": 1', f'<tool_call>{{"name": "{key}"', "<tool_call>{\"name\": \"f\", \"x\": "
                 + "1" * 1100):  # fmt: skip
        for at in range(560, len(text), 3):
            assert parsed(calls("hermes")(), [text[:at], text[at:]]) == parsed(calls("hermes")(), [text])
    text = "[TOOL_CALLS]" + "n" * 300 + "[TOOL_CALLS]now{}"
    assert shown(cut_everywhere(calls("mistral"), text))["calls"] == [("now", {})]


def test_ids_are_those_that_the_templates_take() -> None:
    start = calls("hermes")().push('<tool_call>{"name": "now", "arguments": {')[0]
    assert isinstance(start, CallStart)
    assert re.fullmatch(r"call_[0-9a-f]{24}", start.id)
    pieces = calls("mistral")().push("[TOOL_CALLS]now{}[TOOL_CALLS]now[CALL_ID]a1b2c3d4e[ARGS]{}")
    first, second = (piece.id for piece in pieces if isinstance(piece, CallStart))
    assert re.fullmatch(r"[A-Za-z0-9]{9}", first)
    assert second == "a1b2c3d4e"


def test_arguments_stream_as_they_come() -> None:
    parser = calls("hermes")()
    assert parser.push("Well") == [Content("Well")]
    assert parser.push(", <tool") == [Content(", ")]
    assert parser.push('_call>{"name": "sea') == []
    assert [type(p) for p in parser.push('rch", "arguments": {')] == [CallStart, CallArguments]
    assert parser.push('"q": "x') == [CallArguments(0, '"q": "x')]
    assert parser.push('y"}') == [CallArguments(0, 'y"}')]
    assert parser.push("}\n</tool_call>") == []
    assert parser.finish() == []


def test_a_call_that_breaks_after_it_began_says_so_and_the_rest_is_content() -> None:
    parser = calls("hermes")()
    pieces = parser.push('<tool_call>{"name": "search", "arguments": {"q": oops}')
    assert pieces[1:] == [
        CallArguments(0, '{"q": '),
        CallBroken(0, '<tool_call>{"name": "search", "arguments": {"q": '),
        Content("oops}"),
    ]
    (start, *_) = parser.push('<tool_call>{"name": "now"}')
    assert isinstance(start, CallStart)
    assert start.index == 1


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("deepseek_r1", "Hm.\n</think>\n\nYes.", {"reasoning": "Hm.\n", "content": "\n\nYes."}),
        ("deepseek_r1", "<think>\nHm</thin </think>Yes", {"reasoning": "\nHm</thin ", "content": "Yes"}),
        ("deepseek_r1", "cut off </th", {"reasoning": "cut off </th"}),
        ("deepseek_r1", " \n", {"reasoning": " \n"}),
        ("qwen3", "\n<think>a</think>b", {"reasoning": "a", "content": "b"}),
        ("qwen3", "a</think>b</think>", {"reasoning": "a", "content": "b</think>"}),
        (
            "qwen3",
            'I call <tool_call>{"name": "now"}</tool_call>',
            {"reasoning": "I call ", "content": '<tool_call>{"name": "now"}</tool_call>'},
        ),
        ("think", "plain <think>text</think>", {"content": "plain <think>text</think>"}),
        ("think", " <think>a</think> b", {"reasoning": "a", "content": " b"}),
        ("think", " <thi", {"content": " <thi"}),
        ("mistral", "[THINK]a[/THINK]b", {"reasoning": "a", "content": "b"}),
        ("seed_oss", "<seed:think>a</seed:think>b", {"reasoning": "a", "content": "b"}),
        ("seed_oss", "a</seed:think>b", {"reasoning": "a", "content": "b"}),
        *((name, "a</think>b", {"reasoning": "a", "content": "b"}) for name in ("olmo3", "step3", "minimax_m2")),
        *(
            (name, "<think>a</think>b", {"reasoning": "a", "content": "b"})
            for name in ("glm45", "nemotron_v3", "holo2")
        ),
        ("deepseek_v3", "a</think>b", {"content": "a</think>b"}),
    ],
)
def test_reasoning_is_told_from_the_answer_wherever_it_is_cut(name: str, text: str, expected: dict[str, Any]) -> None:
    assert shown(cut_everywhere(lambda: REASONING_FORMATS[name].parser(ParserContext()), text)) == expected


@pytest.mark.parametrize(
    ("name", "prompt", "variables", "reasons"),
    [
        ("deepseek_r1", "<|Assistant|><think>\n", {}, True),
        ("deepseek_r1", "<think>\n\n</think>\n\n", {}, False),
        ("qwen3", "<|im_start|>assistant\n<think>\n", {}, True),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", {}, False),
        ("qwen3", "<|im_start|>assistant\n", {}, False),
        ("qwen3", "", {"enable_thinking": False}, False),
        ("qwen3", "", {"enable_thinking": True}, True),
        ("deepseek_v3", "", {"thinking": True}, True),
        *((name, "<think>\n\n</think>\n\n", {}, False) for name in ("olmo3", "step3", "minimax_m2")),
        *((name, "", {"enable_thinking": False}, False) for name in ("glm45", "nemotron_v3", "holo2")),
        *((name, "", {"thinking": False}, False) for name in ("glm45", "nemotron_v3", "holo2")),
        *((name, "assistant\n<think>", {}, True) for name in ("glm45", "nemotron_v3", "holo2", "deepseek_v3")),
        *((name, "assistant\n", {}, False) for name in ("glm45", "nemotron_v3", "holo2", "deepseek_v3")),
        ("think", "assistant: <think>", {}, True),
        ("think", "assistant: ", {}, False),
    ],
)
def test_the_prompt_and_the_templates_variables_say_whether_an_untagged_answer_is_reasoning(
    name: str, prompt: str, variables: dict[str, Any], reasons: bool
) -> None:
    parser = REASONING_FORMATS[name].parser(ParserContext(prompt_text=prompt, template_kwargs=variables))
    expected = Reasoning("a") if reasons else Content("a</think>b")
    assert parsed(parser, "a</think>b")[0] == expected


def test_calls_follow_reasoning_and_are_not_looked_for_in_it() -> None:
    def make() -> Parser:
        return ReasoningThenCalls(REASONING_FORMATS["deepseek_r1"].parser(ASKED), calls("hermes")())

    text = '<tool_call>?</think>\n\n<tool_call>\n{"name": "now"}\n</tool_call>'
    assert shown(cut_everywhere(make, text)) == {"reasoning": "<tool_call>?", "calls": [("now", {})]}
    qwen = ReasoningThenCalls(REASONING_FORMATS["qwen3"].parser(ASKED), calls("hermes")())
    found = shown(parsed(qwen, 'Hm <tool_call>{"name": "now"}</tool_call>'))
    assert found == {"reasoning": "Hm ", "calls": [("now", {})]}


def test_forced_calls() -> None:
    text = ' [{"name": "get_weather", "parameters": ' + PLAIN + '}, {"name":"now","parameters":{}}]\n'
    assert shown(cut_everywhere(lambda: required_parser(openai_call_id), text)) == {"calls": [CALL, ("now", {})]}
    assert shown(cut_everywhere(lambda: named_parser("get_weather", openai_call_id), ESCAPED + "\n")) == {
        "calls": [CALL]
    }
    cut = shown(cut_everywhere(lambda: named_parser("f", openai_call_id), ' {"a": "b'))
    assert cut == {"calls": [("f", '{"a": "b')]}
    for make in (lambda: required_parser(openai_call_id), lambda: named_parser("f", openai_call_id)):
        assert shown(cut_everywhere(make, "  sorry [")) == {"content": "  sorry ["}


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_start|>",
    "<|python_end|>", "<think>", "</think>", '{"name": "now", "arguments": ', '{"name": "search"', ', "parameters": {',
    "}", "{", "[", "]", "]]", '"', "\\", "\\u00", "now{", "now(", "q=", "'", ")", ",", ":", ";", "\n", " ", "1", "-",
    "é😀", "true", "{}", "}}", "text",
]  # fmt: skip

texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=25).map("".join)
MAKERS: dict[str, Make] = {
    **{name: calls(name) for name in ("hermes", "llama3_json", "mistral", "pythonic")},
    "required": lambda: required_parser(openai_call_id),
    "named": lambda: named_parser("f", openai_call_id),
    **{name: lambda name=name: REASONING_FORMATS[name].parser(ParserContext()) for name in ("qwen3", "think")},  # type: ignore[misc]
}
MARKS = re.compile(r"</?tool_call>|<\|python_(?:tag|start|end)\|>|\[TOOL_CALLS\]|\[ARGS\]|\[CALL_ID\]|</?think>")


@settings(max_examples=150, deadline=None)
@given(text=texts, cuts=st.lists(st.integers(0, 120), max_size=8), name=st.sampled_from(sorted(MAKERS)))
def test_any_text_gives_the_same_pieces_for_any_cuts_and_valid_unicode(text: str, cuts: list[int], name: str) -> None:
    make = MAKERS[name]
    whole = parsed(make(), [text])
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert parsed(make(), [text[a:b] for a, b in pairwise(bounds)]) == whole
    assert parsed(make(), text) == whole
    open_calls: set[int] = set()
    for piece in whole:
        if isinstance(piece, CallStart):
            assert piece.index not in open_calls
            assert piece.name in NAMES or name not in ("llama3_json", "pythonic")
            open_calls.add(piece.index)
        elif isinstance(piece, CallArguments | CallBroken):
            assert piece.index in open_calls
    for _, arguments in shown(whole).get("calls", [])[:-1]:
        assert isinstance(arguments, dict), "only the last call may be cut short"


@settings(max_examples=150, deadline=None)
@given(text=texts, name=st.sampled_from(sorted(MAKERS)))
def test_what_is_no_call_comes_out_in_full(text: str, name: str) -> None:
    found = shown(parsed(MAKERS[name](), [text]))
    if "calls" not in found and "reasoning" not in found and "think" not in name and name != "qwen3":
        assert found.get("content", "") == text
    kept = found.get("reasoning", "") + found.get("content", "")
    if "calls" not in found:
        assert re.sub(r"\s", "", MARKS.sub("", kept)) == re.sub(r"\s", "", MARKS.sub("", text))


@settings(max_examples=100, deadline=None)
@given(
    prose=st.text(st.characters(codec="utf-8", exclude_characters="<[{"), max_size=20),
    arguments=st.lists(
        st.dictionaries(
            st.text(st.characters(codec="utf-8"), max_size=6),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                | st.text(st.characters(codec="utf-8"), max_size=12),
                lambda inner: st.lists(inner, max_size=3)
                | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), inner, max_size=3),
                max_leaves=8,
            ),
            max_size=4,
        ),
        min_size=1,
        max_size=3,
    ),
    ascii_only=st.booleans(),
)  # fmt: skip
def test_any_arguments_come_through_every_format(prose: str, arguments: list[dict[str, Any]], ascii_only: bool) -> None:
    dumped = [json.dumps(given, ensure_ascii=ascii_only) for given in arguments]
    objects = [f'{{"name": "now", "arguments": {text}}}' for text in dumped]
    python = [{f"k{i}": json.loads(json.dumps(value)) for i, value in enumerate(given.values())} for given in arguments]
    written: dict[str, tuple[str, list[dict[str, Any]]]] = {
        "hermes": (prose + "".join(f"<tool_call>{text}</tool_call>" for text in objects), arguments),
        "llama3_json": ("; ".join(objects), arguments),
        "mistral": (prose + "".join(f"[TOOL_CALLS]now{text}" for text in dumped), arguments),
        "pythonic": (
            "[" + ", ".join(f"now({', '.join(f'{k}={v!r}' for k, v in p.items())})" for p in python) + "]",
            python,
        ),
    }
    for name, (text, expected) in written.items():
        found = shown(parsed(calls(name)(), text))
        assert [given for _, given in found["calls"]] == expected, (name, text)
        if name in ("hermes", "mistral") and prose.strip(" \t\r\n"):
            assert found["content"] == prose


JSON_BITS = [*'{}[]",:\\ntfalse u0123.-+eE \n', '"a"', "true", "null", "\\u12aF"]


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.sampled_from(JSON_BITS), max_size=14).map("".join))
def test_the_scanner_agrees_with_json(text: str) -> None:
    """Control characters in strings aside, which it mends."""
    scanner = JsonScanner()
    start = text.strip(" \n")
    end, _ = scanner.feed(start + "\x00", 0) if start else (0, "")
    try:
        json.loads(text, strict=False, parse_constant=lambda _: 1 / 0)
        valid = True
    except (ValueError, ZeroDivisionError):
        valid = False
    assert (scanner.done and end == len(start)) == valid


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" * 20_000,
        "<tool_cal" * 25_000,
        "<" * 60_000,
        " \n" * 60_000,
        '<tool_call>{"name": "now", "arguments": {"a": "' + "x" * 60_000,
        '<tool_call>{"name": "now", "arguments": ' + '{"a":' * 40_000,
        '<tool_call>{"arguments": {"a": "' + "\\n" * 60_000,
        '<tool_call>{"name": "now"}' + " " * 100_000 + "</tool_call>",
        '{"name": "now", "parameters": {}};' * 6_000,
        "<tool_call>" + '{"name": "now", "arguments": {}}</tool_call><tool_call>' * 3_000,
        "{" * 60_000,
        "\n{" * 60_000,
        "[TOOL_CALLS]" * 16_000,
        "[TOOL_CALLS]" + "n" * 60_000,
        "[TOOL_CALLS][" + " " * 60_000,
        "[TOOL_CALLS]now" + "[CALL_ID]" * 20_000,
        "[now(), " * 25_000,
        "[search(q=" + "[" * 60_000,
        "[search(q=" + "-" * 60_000,
        "[search(q='" + "\\x41" * 50_000,
        "[search(" + "a=1," * 50_000,
        "<think>" * 28_000,
        "</thin" * 33_000,
    ],
)
def test_hostile_text_costs_time_in_proportion(text: str) -> None:
    for make in MAKERS.values():
        begin = time.process_time()
        parsed(make(), [text])
        parser = make()
        for at in range(0, len(text), 8):
            parser.push(text[at : at + 8])
        parser.finish()
        assert not too_long(time.process_time() - begin, 4), "quadratic text took minutes"
