"""Our parsers by their names in the options, which are vLLM's."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection

from handlers.parsers.base import AnswerFormats, Parser, ParserContext, Pieces, ReasoningFormat, ToolFormat
from handlers.parsers.json_calls import (
    ARGS,
    CALL_ID,
    HERMES_CLOSE,
    HERMES_OPEN,
    TAG,
    TOOL_CALLS,
    CallArray,
    HermesParser,
    Llama3JsonParser,
    MistralParser,
    OnlyArguments,
    new_call_id,
)
from handlers.parsers.python_calls import END, START, PythonicParser
from handlers.parsers.reasoning import Begins, ThinkParser, in_prompt


def openai_call_id() -> str:
    """Make an id in OpenAI's form."""
    return f"call_{secrets.token_hex(12)}"


def _hermes(opening: str, closing: str) -> ToolFormat:
    return ToolFormat(
        lambda asked: HermesParser(Pieces(openai_call_id), opening, closing),
        frozenset({opening, closing}),
        openai_call_id,
    )


_HERMES = _hermes(HERMES_OPEN, HERMES_CLOSE)
_LLAMA3_JSON = ToolFormat(
    lambda asked: Llama3JsonParser(Pieces(openai_call_id), asked.tool_names), frozenset({TAG}), openai_call_id
)
_MISTRAL = ToolFormat(
    lambda asked: MistralParser(Pieces(new_call_id)), frozenset({TOOL_CALLS, ARGS, CALL_ID}), new_call_id
)
_PYTHONIC = ToolFormat(
    lambda asked: PythonicParser(Pieces(openai_call_id), asked.tool_names), frozenset({START, END}), openai_call_id
)

TOOL_FORMATS = {
    "hermes": _HERMES,
    "qwen3_json": _HERMES,
    "longcat": _hermes("<longcat_tool_call>", "</longcat_tool_call>"),
    "llama3_json": _LLAMA3_JSON,
    "llama4_json": _LLAMA3_JSON,
    "mistral": _MISTRAL,
    "pythonic": _PYTHONIC,
    "llama4_pythonic": _PYTHONIC,
}


def required_parser(call_id: Callable[[], str]) -> Parser:
    """Make a parser for a completion whose schema is an array of {"name", "parameters"}."""
    return CallArray(Pieces(call_id))


def named_parser(name: str, call_id: Callable[[], str]) -> Parser:
    """Make a parser for a completion whose schema is that of one call's arguments."""
    return OnlyArguments(Pieces(call_id), name)


def _tags(begins: Begins, opening: str = "<think>", closing: str = "</think>") -> ReasoningFormat:
    """begins: how a completion begins if the prompt ends with no tag (see `ThinkParser`)."""

    def parser(asked: ParserContext) -> Parser:
        return ThinkParser(opening, closing, in_prompt(asked, opening, closing) or begins)

    return ReasoningFormat(parser, frozenset({opening, closing}))


def _switched(variables: tuple[str, ...], default: bool, *, interrupt: str = "") -> ReasoningFormat:
    """Reasoning that a variable of the chat template, set by the client, switches on or off.

    If the prompt shows no opening tag, the model writes it itself. An unknown prompt may have contained the tag.
    """

    def parser(asked: ParserContext) -> Parser:
        given = [asked.template_kwargs[name] for name in variables if name in asked.template_kwargs]
        begins: Begins | None = in_prompt(asked, "<think>", "</think>")
        if begins is None and not (any(given) if given else default):
            begins = "content"
        if begins is None:
            begins = "tagged" if asked.prompt_text else "reasoning"
        return ThinkParser("<think>", "</think>", begins, interrupt=interrupt)

    return ReasoningFormat(parser, frozenset({"<think>", "</think>"}))


_R1 = _tags("reasoning")
_QWEN3 = _switched(("enable_thinking",), True, interrupt=HERMES_OPEN)
_SWITCHED = _switched(("enable_thinking", "thinking"), True)

REASONING_FORMATS = {
    "think": _tags("tagged"),
    "deepseek_r1": _R1,
    "olmo3": _R1,
    "step3": _R1,
    "minimax_m2": _R1,
    "qwen3": _QWEN3,
    "glm45": _SWITCHED,
    "nemotron_v3": _SWITCHED,
    "holo2": _SWITCHED,
    "deepseek_v3": _switched(("thinking", "enable_thinking"), False),
    "seed_oss": _tags("reasoning", "<seed:think>", "</seed:think>"),
    "mistral": _tags("tagged", "[THINK]", "[/THINK]"),
}


def answer_formats(tools: str | None = None, auto: bool = False, reasoning: str | None = None) -> AnswerFormats:
    """Return the formats for `option.tool_call_parser`, `enable_auto_tool_choice` and `reasoning_parser`."""
    return AnswerFormats(
        tools=None if tools is None else TOOL_FORMATS[tools],
        auto=auto and tools is not None,
        reasoning=None if reasoning is None else REASONING_FORMATS[reasoning],
    )


VLLM_PARSER = "vllm:"
"""Before a parser's name: vLLM's parser, even if we have one of that name."""


def of_vllm(name: str | None, ours: Collection[str]) -> str | None:
    """Return vLLM's name of the parser; None if it is ours, or if there is none."""
    if name is None or name in ours:
        return None
    return name.removeprefix(VLLM_PARSER)
