"""vLLM's parsers behind our interface: by name, whole and in streams cut anywhere, and when one of them fails."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from handlers.backends.vllm.engine import VllmEngine
from handlers.backends.vllm.parsers import VllmParser, VllmParsers, vllm_parsers
from handlers.build import build_engine
from handlers.errors import InvalidConfiguration
from handlers.parsers.base import (
    AnswerFormats,
    CallArguments,
    CallBroken,
    CallStart,
    Content,
    Parser,
    ParserContext,
    Piece,
    Reasoning,
    parse_whole,
)
from handlers.parsers.reasoning import ReasoningThenCalls
from handlers.prompts.tokenizer import load_tokenizer
from properties.configuration import Configuration, resolve
from properties.problem import ConfigurationError
from tests.support.live import LiveServer
from tests.support.shapes import SHAPES

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
WEATHER = ("get_weather", {"city": "Zürich", "days": 3})
NOW: tuple[str, dict[str, Any]] = ("now", {})

MARKS = [
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁sep｜>", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>"),
    *("<|tool_call_end|>", "<|tool_call_argument_begin|>", "<|tool_call|>"),
]

CALLS = {
    "vllm:hermes": (
        'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}\n'
        '</tool_call>\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "Let me look.",
        [WEATHER, NOW],
    ),
    "qwen3_coder": (
        "Let me look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nZürich\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n"
        "</tool_call>",
        "Let me look.",
        [WEATHER, NOW],
    ),
    "deepseek_v3": (
        "Let me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
        '```json\n{"city": "Zürich", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function'
        "<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Let me look.",
        [WEATHER, NOW],
    ),
    "kimi_k2": (
        "Let me look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"city": "Zürich", "days": 3}<|tool_call_end|><|tool_call_begin|>'
        "functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        "Let me look.",
        [WEATHER, NOW],
    ),
    "granite": (
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}, '
        '{"name": "now", "arguments": {}}]',
        "",
        [WEATHER, NOW],
    ),
    "glm45": (
        "Let me look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Zürich</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        "Let me look.",
        [WEATHER, NOW],
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """That of the shapes, with other families' marks."""
    own = load_tokenizer(str(SHAPES), trust_remote_code=False)
    own.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    own.add_special_tokens({"additional_special_tokens": MARKS})
    return own


def configured(*options: str) -> Configuration:
    return resolve(model=str(SHAPES), environ={}, options=options)


def formats(tokenizer: Any, *options: str) -> AnswerFormats:
    return VllmParsers(configured(*options).settings, tokenizer).formats


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def deltas(tokenizer: Any, text: str, count: int) -> Iterator[tuple[str, list[int]]]:
    """The text as an engine streams it, `count` tokens at a time, characters whole."""
    ids, before = ids_of(tokenizer, text), ""
    for at in range(0, len(ids), count):
        now = tokenizer.decode(ids[: at + count], skip_special_tokens=False)
        if now.endswith("\ufffd"):
            now = before
        yield now[len(before) :], ids[at : at + count]
        before = now
    assert before == text


def streamed(parser: Parser, cut: Sequence[tuple[str, list[int]]]) -> list[Piece]:
    pieces = [piece for text, ids in cut for piece in parser.push(text, ids)]
    return [*pieces, *parser.finish()]


def told(pieces: Sequence[Piece]) -> tuple[str, str, list[tuple[str, Any]]]:
    """Reasoning, content without the white space around it, and calls."""
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    calls = []
    for start in (piece for piece in pieces if isinstance(piece, CallStart)):
        arguments = [p.text for p in pieces if isinstance(p, CallArguments) and p.index == start.index]
        assert start.id
        calls.append((start.name, json.loads("".join(arguments))))
    return reasoning, content.strip(), calls


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_those_of_the_whole_extraction_wherever_the_stream_is_cut(name: str, tokenizer: Any) -> None:
    text, content, calls = CALLS[name]
    found = formats(tokenizer, f"tool_call_parser={name}").tools
    assert found is not None
    asked = ParserContext(TOOLS)
    assert told(parse_whole(found.parser(asked), text, ids_of(tokenizer, text))) == ("", content, calls)
    for count in (1, 2, 3, 7, 1000):
        cut = list(deltas(tokenizer, text, count))
        pieces = streamed(found.parser(asked), cut)
        assert told(pieces) == ("", content, calls), count
        called = [isinstance(piece, CallStart) for piece in pieces].index(True)
        assert not any(isinstance(piece, Content) for piece in pieces[called:])
    without_ids = [(more, list[int]()) for more, _ in deltas(tokenizer, text, 1)]
    assert told(streamed(found.parser(asked), without_ids)) == ("", content, calls)
    plain = "Nothing to look up: it is 3 < 4 in Zürich."
    for count in (1, 5):
        pieces = streamed(found.parser(asked), list(deltas(tokenizer, plain, count)))
        assert told(pieces) == ("", plain, [])


@pytest.mark.parametrize("name", ["kimi_k2", "vllm:deepseek_r1", "vllm:qwen3"])
def test_reasoning_is_that_of_the_whole_extraction(name: str, tokenizer: Any) -> None:
    text = "<think>Hmm, the square is red.</think>It is red."
    found = formats(tokenizer, f"reasoning_parser={name}").reasoning
    assert found is not None
    expected = ("Hmm, the square is red.", "It is red.", list[Any]())
    assert told(parse_whole(found.parser(ParserContext()), text, ids_of(tokenizer, text))) == expected
    for count in (1, 2, 1000):
        assert told(streamed(found.parser(ParserContext()), list(deltas(tokenizer, text, count)))) == expected


def test_reasoning_is_found_in_deltas_of_a_tokenizer_of_sentencepiece() -> None:
    texts = ["<unk>", "\u2581", *map(chr, range(33, 127)), *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [f"\u2581{chr(letter)}" for letter in range(97, 123)]
    vocabulary = {text: number for number, text in enumerate([*texts, *words])}
    merges = [("\u2581", word[1]) for word in words]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    own = PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=["<think>", "</think>"])
    text = "<think>Hmm, the square is red.</think>It is red."
    found = formats(own, "reasoning_parser=vllm:deepseek_r1").reasoning
    assert found is not None
    for count in (1, 2, 7, 1000):
        pieces = streamed(found.parser(ParserContext()), list(deltas(own, text, count)))
        assert told(pieces) == ("Hmm, the square is red.", "It is red.", []), count


@pytest.mark.parametrize(
    ("tools", "reasoning", "together"),
    [
        ("qwen3_coder", "vllm:qwen3", True),
        ("qwen3_coder", "qwen3", False),
        ("hermes", "kimi_k2", False),
        ("deepseek_v3", "deepseek_r1", False),
    ],
)
def test_reasoning_and_calls_may_each_be_ours_or_vllms(
    tools: str, reasoning: str, together: bool, tokenizer: Any
) -> None:
    options = [
        f"tool_call_parser={tools}",
        f"reasoning_parser={reasoning}",
        "enable_auto_tool_choice=true",
    ]
    found = formats(tokenizer, *options)
    assert found.auto
    assert (found.together is not None) == together
    calls, content, expected = CALLS["vllm:hermes" if tools == "hermes" else tools]
    text = f"<think>They want the weather.</think>{calls}"

    def parser() -> Parser:
        asked = ParserContext(TOOLS)
        if found.together is not None:
            return found.together(asked)
        assert found.tools is not None
        assert found.reasoning is not None
        return ReasoningThenCalls(found.reasoning.parser(asked), found.tools.parser(asked))

    for count in (1, 4):
        pieces = streamed(parser(), list(deltas(tokenizer, text, count)))
        assert told(pieces) == ("They want the weather.", content, expected)
    whole = parse_whole(parser(), text, ids_of(tokenizer, text))
    assert told(whole) == ("They want the weather.", content, expected)


def test_what_both_have_is_ours_and_special_marks_are_kept_for_vllms(tokenizer: Any) -> None:
    assert vllm_parsers(configured("tool_call_parser=hermes").settings, tokenizer) is None
    ours = formats(tokenizer, "tool_call_parser=hermes", "reasoning_parser=granite")
    assert ours.tools is not None
    assert not isinstance(ours.tools.parser(ParserContext(TOOLS)), VllmParser)
    theirs = formats(tokenizer, "tool_call_parser=vllm:hermes").tools
    assert theirs is not None
    assert isinstance(theirs.parser(ParserContext(TOOLS)), VllmParser)
    kimi = formats(tokenizer, "tool_call_parser=kimi_k2").tools
    assert kimi is not None
    assert "<|tool_call_begin|>" in kimi.markers


class _Trips:
    """vLLM's parser, which raises at the nth delta, and for a whole answer."""

    def __init__(self, real: Any, at: int) -> None:
        self._real, self._left = real, at

    def parse_delta(self, *args: Any, **named: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise IndexError("secret answer")
        return self._real.parse_delta(*args, **named)

    def parse(self, *args: Any, **named: Any) -> Any:
        raise KeyError("secret answer")


def tripping(parser: Parser, at: int) -> VllmParser:
    """The same parser, where vLLM's trips."""
    assert isinstance(parser, VllmParser)
    real, request = parser.open_parser()
    return VllmParser(lambda: (_Trips(real, at), request), parser.tokenizer, (), "tripping")


@pytest.mark.parametrize("name", ["vllm:hermes", "qwen3_coder", "kimi_k2"])
def test_a_parser_that_raises_loses_nothing_and_is_logged_once(
    name: str, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    text, _, _ = CALLS[name]
    found = formats(tokenizer, f"tool_call_parser={name}").tools
    assert found is not None
    cut = list(deltas(tokenizer, text, 1))
    for at in range(len(cut) + 1):
        parser = tripping(found.parser(ParserContext(TOOLS)), at)
        caplog.clear()
        with caplog.at_level(logging.ERROR, "handlers"):
            pieces = streamed(parser, cut)
        (record,) = caplog.records
        assert "IndexError" in record.getMessage()
        assert "secret" not in record.getMessage()
        kept = "".join(piece.text for piece in pieces if isinstance(piece, Content | CallBroken))
        starts = [piece for piece in pieces if isinstance(piece, CallStart)]
        if not starts:
            assert kept == text, at
        rest = "".join(more for more, _ in cut[at:])
        assert kept.endswith(rest), at
        broken = [piece.index for piece in pieces if isinstance(piece, CallBroken)]
        for start in starts:
            arguments = "".join(p.text for p in pieces if isinstance(p, CallArguments) and p.index == start.index)
            assert start.index in broken or isinstance(json.loads(arguments), dict)
    parser = tripping(found.parser(ParserContext(TOOLS)), 0)
    caplog.clear()
    assert parse_whole(parser, text) == [Content(text)]
    assert len(caplog.records) == 1


def test_tools_that_vllms_own_reader_would_refuse_reach_the_parser_all_the_same(tokenizer: Any) -> None:
    text, content, calls = CALLS["qwen3_coder"]
    odd = json.loads(json.dumps(TOOLS))
    odd[0]["function"]["strict"] = {"no": "boolean"}
    found = formats(tokenizer, "tool_call_parser=qwen3_coder").tools
    assert found is not None
    asked = ParserContext(odd, template_kwargs={"enable_thinking": "perhaps"})
    assert told(parse_whole(found.parser(asked), text)) == ("", content, calls)


def test_an_unknown_name_is_refused_with_the_list_and_the_nearest(tmp_path: Path) -> None:
    options = ["tool_call_parser=qwen3_codr", "reasoning_parser=granit"]
    for backend in ("vllm", "rolling"):
        configuration = configured(f"rolling_batch={backend}", *options)
        with pytest.raises(ConfigurationError) as caught:
            build_engine(configuration, SHAPES)
        tools, reasoning = (str(problem) for problem in caught.value.problems)
        assert "allowed: hermes, " in tools
        assert ("did you mean qwen3_coder?" in tools) == (backend == "vllm")
        assert ("did you mean granite?" in reasoning) == (backend == "vllm")
        assert ("kimi_k2" in reasoning) == (backend == "vllm")
    with pytest.raises(ConfigurationError, match="a parser of vLLM, and vLLM is not what serves"):
        build_engine(configured("rolling_batch=rolling", "tool_call_parser=qwen3_coder"), SHAPES)
    start: Any = build_engine(configured("rolling_batch=vllm", "tool_call_parser=qwen3_coder"), SHAPES)
    assert start.func == VllmEngine.start


def test_a_tokenizer_without_the_marks_is_told_at_the_start() -> None:
    bare = load_tokenizer(str(SHAPES), trust_remote_code=False)
    with pytest.raises(InvalidConfiguration, match=r"option\.tool_call_parser = 'deepseek_v3'.*tokens"):
        formats(bare, "tool_call_parser=deepseek_v3")


def test_a_server_answers_through_them() -> None:
    options = ["tool_call_parser=qwen3_coder", "reasoning_parser=granite", "enable_auto_tool_choice=true"]
    with LiveServer(SHAPES, *options) as server:
        fields = {"tools": TOOLS, "max_tokens": 12, "temperature": 0}
        whole = server.chat("What is this?", **fields).json()["choices"][0]
        assert whole["message"]["content"]
        assert "tool_calls" not in whole["message"]
        plain = server.chat("What is this?", max_tokens=12, temperature=0, stream=True, tools=TOOLS)
        chunks = [
            json.loads(line.removeprefix("data: ")) for line in plain.text.splitlines() if line.startswith("data: {")
        ]
        content = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        assert content == whole["message"]["content"]
