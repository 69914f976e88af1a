"""Whatever this server, and those whose clients it has, return as a message is taken back as history."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.parsers.base import AnswerFormats
from handlers.parsers.select import REASONING_FORMATS, TOOL_FORMATS, answer_formats
from handlers.prompts.renderer import PromptRenderer
from tests.support.scripted import said
from tests.support.tokenizers import byte_level, wrapped
from tests.support.tools import TOOLS, added_up, events, read, tool, whole

CALLS = """
{%- for call in message.tool_calls or [] %}[call {{ call.function.name }}
{%- for name, value in call.function.arguments.items() %} {{ name }}={{ value | tojson }}{% endfor %}]{% endfor %}"""
THOUGHT = "{% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}"
TURN = "{% for message in messages %}{{ message.role }}:" + THOUGHT
EACH = "{% for part in message.content %}{{ part.text }}{% endfor %}"
TEMPLATES = {
    "strings": TURN + "{{ message.content.strip() }}" + CALLS + "|{% endfor %}",
    "parts": TURN + EACH + CALLS + "|{% endfor %}",
    "either": TURN
    + "{% if message.content is string %}{{ message.content.split('</think>')[-1] }}{% else %}"
    + EACH
    + "{% endif %}"
    + CALLS
    + "|{% endfor %}",
}
RENDERERS = {name: PromptRenderer(wrapped(byte_level()), source) for name, source in TEMPLATES.items()}

PIECES = st.sampled_from(
    [
        "Well. ", "<think>", "Hm.", "</think>", '<tool_call>{"name": "draw", "arguments": {"a": [1, "x"]}}</tool_call>',
        '{"name": "now", "parameters": {}}', '[TOOL_CALLS][{"name": "draw", "arguments": {"a": {"b": null}}}]',
        "[draw(color='red'), now()]", '{"count": 2}', '[{"name": "now", "parameters": {}}]', "null", "<image>", "é🌍",
    ]
)  # fmt: skip
FORMATS = st.builds(
    lambda tools, reasoning: answer_formats(tools, auto=True, reasoning=reasoning),
    st.sampled_from(sorted(TOOL_FORMATS)),
    st.sampled_from([None, *sorted(REASONING_FORMATS)]),
) | st.just(AnswerFormats())
ASKED = st.sampled_from(
    [
        {}, {"tools": TOOLS, "tool_choice": "required"}, {"tools": TOOLS, "tool_choice": "draw"},
        {"functions": [{"name": "draw"}], "function_call": {"name": "draw"}}, {"logprobs": True, "top_logprobs": 1},
        {"return_token_ids": True}, {"echo": True}, {"include_reasoning": False},
        {"response_format": {"type": "json_object"}},
    ]
)  # fmt: skip


def taken_back(*turns: dict[str, Any]) -> list[str]:
    """The prompts of a conversation with these turns, by each template."""
    result = {"role": "tool", "content": [{"type": "text", "text": "sunny"}], "tool_call_id": "c"}
    messages = [{"role": "user", "content": "hi"}, *turns, result, {"role": "user", "content": "and?"}]
    prompt = read({"messages": messages}).prompt
    return [renderer.render(prompt).text for renderer in RENDERERS.values()]


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(PIECES, min_size=1, max_size=5),
    formats=FORMATS,
    asked=ASKED,
    cut=st.integers(0, 40),
    streamed=st.booleans(),
    own_choice=st.booleans(),
)
def test_every_reply_is_taken_back_as_history(
    pieces: list[str],
    formats: AnswerFormats,
    asked: dict[str, Any],
    cut: int,
    streamed: bool,
    own_choice: bool,
) -> None:
    text = "".join(pieces)
    text = text[: len(text) - cut] or text
    if own_choice and formats.auto and not asked:
        asked = {"tools": TOOLS}
    steps = said(*text, reason="length" if cut else "stop")
    if streamed:
        message, _ = added_up(events(steps, formats, **asked))
    else:
        message = whole(steps, formats, **asked).choices[0].message.to_dict(mode="json")
    for prompt in taken_back(message):
        assert prompt.startswith("user:hi|assistant:")
        assert prompt.endswith("tool:sunny|user:and?|")


@pytest.mark.parametrize(
    ("turn", "shown"),
    [
        ({"content": None, "reasoning": "Hm", "refusal": None}, "(Hm)"),
        ({"reasoning_content": "Hm", "tool_calls": []}, "(Hm)"),
        ({"content": None, "refusal": "No.", "annotations": [], "audio": None}, "No."),
        # A call as it is where the answer was cut in the middle of it, and as clients complete it.
        ({"content": None, "tool_calls": [{"id": "c", **tool("f", arguments='{"a": ')}]}, "[call f]"),
        ({"content": None, "tool_calls": [{"id": "c", **tool("f", arguments="null")}]}, "[call f]"),
        ({"content": "", "tool_calls": [{"id": "c", **tool("f", arguments=None)}]}, "[call f]"),
        ({"content": "", "function_call": {"name": "f", "arguments": '{"a"'}}, "[call f]"),
        # A delta's call, and TGI's: numbers for ids, arguments as an object, a description.
        ({"tool_calls": [{"index": 0, "id": "0", **tool("f", arguments='{"a": 1}')}]}, "[call f a=1]"),
        ({"tool_calls": [{"id": 0, **tool("f", arguments={"a": 1}, description=None)}]}, "[call f a=1]"),
        ({"tool_calls": [{"id": "0", **tool("f", {"a": 1})}]}, "[call f a=1]"),
        # LMI's, which wraps what vLLM made, and the one of its older runtime.
        ({"content": "Yes.", "name": None, "tool_calls": None, "function_call": None}, "Yes."),
        ({"content": [{"type": "text", "text": "Yes."}]}, "Yes."),
    ],
)
def test_messages_of_other_servers_are_taken_too(turn: dict[str, Any], shown: str) -> None:
    for prompt in taken_back({"role": "assistant", **turn}):
        assert prompt == f"user:hi|assistant:{shown}|tool:sunny|user:and?|"
