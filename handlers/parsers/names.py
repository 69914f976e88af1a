"""Finds the parser that an option names: one of ours, or one of the installed vLLM's."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence, Set
from typing import TYPE_CHECKING

from handlers.backends.vllm.compat import reasoning_parser_names, tool_parser_names
from handlers.parsers.select import REASONING_FORMATS, TOOL_FORMATS
from properties.configuration import Configuration
from properties.names import key_of
from properties.problem import Problem

if TYPE_CHECKING:
    from handlers.backends.base import Backend

PREFIX = "vllm:"
"""Selects vLLM's parser where both have one of that name."""


def of_vllm(name: str | None, ours: Collection[str]) -> str | None:
    """Return vLLM's name of the parser; None if it is ours, or if there is none."""
    if name is None or name in ours:
        return None
    return name.removeprefix(PREFIX)


def parser_problems(configuration: Configuration, backend: Backend | None = None) -> list[Problem]:
    """Report configured parsers that do not exist, or that the backend cannot use.

    Args:
        configuration: The configuration.
        backend: None if it is not known yet.
    """
    problems = []
    for option, ours, theirs, usable in (
        (
            "tool_call_parser",
            TOOL_FORMATS,
            tool_parser_names(),
            None if backend is None else backend.tool_parsers,
        ),
        (
            "reasoning_parser",
            REASONING_FORMATS,
            reasoning_parser_names(),
            None if backend is None else backend.reasoning_parsers,
        ),
    ):
        name, source = getattr(configuration.settings, option), configuration.sources[option]
        text = _problem(name, sorted(ours), sorted(theirs), theirs if usable is None else usable)
        if text is not None:
            text = f"{key_of(option)} = {name!r} ({source.location}): {text}"
            problems.append(Problem(text, option, source))
    return problems


def _problem(name: str | None, ours: Sequence[str], theirs: Sequence[str], usable: Set[str]) -> str | None:
    """theirs: vLLM's parsers. usable: those of them that the backend can use."""
    vllms = of_vllm(name, ours)
    if name is None or vllms is None:
        return None
    allowed = f"allowed: {', '.join(ours)}"
    if vllms in theirs:
        if vllms in usable:
            return None
        return f"this is a parser of vLLM, and vLLM is not what serves this model; {allowed}"
    others = [one for one in theirs if one in usable and one not in ours]
    if others:
        allowed += f"; by vLLM, where it serves: {', '.join(others)}"
    elif not theirs:
        allowed += f"; vLLM has more ({PREFIX}hermes forces one of its own), but is not installed"
    near = difflib.get_close_matches(vllms.lower(), [*ours, *others], n=1)
    return f"there is no such parser{f'; did you mean {near[0]}?' if near else ''}; {allowed}"
