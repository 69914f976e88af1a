"""What a chat's answers look like: which parser reads them, and which grammar they must match."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.sampling_params import SamplingParams
from handlers.backends.base import PromptStats
from handlers.errors import InvalidRequest
from handlers.parsers.base import Asked, Parser
from handlers.parsers.reasoning import ReasoningThenCalls
from handlers.parsers.select import named_parser, openai_call_id, required_parser
from handlers.protocols.base import Conventions
from handlers.protocols.openai.parsed import MakeParser, ParsedAnswers
from handlers.protocols.openai.tools import Tools
from handlers.request import Constraint


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What a request's answers look like, to the engine and to the client.

    parsed: None for plain text. keeps_special_tokens: calls or reasoning are marked by some. hides_tokens: they
    would show what is not to be shown.
    """

    constraint: Constraint | None
    parsed: ParsedAnswers | None = None
    keeps_special_tokens: bool = False
    hides_tokens: bool = False

    def applied(self, sampling: SamplingParams) -> SamplingParams:
        if self.keeps_special_tokens and sampling.skip_special_tokens:
            return msgspec.structs.replace(sampling, skip_special_tokens=False)
        return sampling


def answer_form(
    tools: Tools | None,
    constraint: Constraint | None,
    conventions: Conventions,
    template_kwargs: Mapping[str, Any],
    *,
    hide_reasoning: bool = False,
) -> AnswerForm:
    """A constraint holds from the first token on, so a constrained answer has neither reasoning nor calls of the
    model's own choice. Raises InvalidRequest where a call is forced as well."""
    formats = conventions.formats
    if tools is not None and tools.forced:
        if constraint is not None:
            choice = "function_call" if tools.legacy else "tool_choice"
            raise InvalidRequest(
                f"{constraint.param} and a {choice} that forces a call exclude each other: send one of them",
                param=constraint.param,
            )
        named = tools.choice == "named"
        called = "stop" if named else "function_call" if tools.legacy else "tool_calls"
        return AnswerForm(
            tools.constraint(),
            ParsedAnswers(
                _forced(tools, conventions), called=called, parallel=tools.parallel, legacy=tools.legacy
            ),
        )
    calls = formats.tools if tools is not None else None
    if constraint is not None or (calls is None and formats.reasoning is None):
        return AnswerForm(constraint)
    reasoning = formats.reasoning
    definitions = [] if tools is None else tools.callable

    def make(stats: PromptStats) -> Parser:
        asked = Asked(definitions, stats.prompt_text, stats.prompt_token_ids, template_kwargs)
        if reasoning is None or calls is None:
            return (calls or reasoning).parser(asked)  # type: ignore[union-attr]
        if formats.together is not None:
            return formats.together(asked)
        return ReasoningThenCalls(reasoning.parser(asked), calls.parser(asked))

    markers = frozenset[str]().union(*(known.markers for known in (calls, reasoning) if known is not None))
    legacy = tools is not None and tools.legacy
    return AnswerForm(
        None,
        ParsedAnswers(
            make,
            called="function_call" if legacy else "tool_calls",
            parallel=tools is None or tools.parallel,
            hide_reasoning=hide_reasoning,
            legacy=legacy,
        ),
        keeps_special_tokens=not markers.isdisjoint(conventions.special_tokens),
        hides_tokens=hide_reasoning and reasoning is not None,
    )


def _forced(tools: Tools, conventions: Conventions) -> MakeParser:
    formats = conventions.formats
    call_id = openai_call_id if formats.tools is None else formats.tools.call_id
    if tools.choice == "named":
        name: str = tools.callable[0]["function"]["name"]
        return lambda stats: named_parser(name, call_id)
    return lambda stats: required_parser(call_id)
