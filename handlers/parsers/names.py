"""Finds the parser that an option names: one of ours, or one of the installed vLLM's."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from handlers.backends.vllm.options.fields import reasoning_parser_names, tool_parser_names
from handlers.parsers.select import REASONING_FORMATS, TOOL_FORMATS
from properties.configuration import Configuration
from properties.field import BackendName
from properties.names import key_of
from properties.problem import Problem

PREFIX = "vllm:"
"""Selects vLLM's parser where both have one of that name."""


def of_vllm(name: str | None, ours: Collection[str]) -> str | None:
    """Return vLLM's name of the parser; None if it is ours, or if there is none."""
    if name is None or name in ours:
        return None
    return name.removeprefix(PREFIX)


def parser_problems(configuration: Configuration, backend: BackendName | None = None) -> list[Problem]:
    """Report configured parsers that do not exist, or that the backend cannot use.

    Args:
        configuration: The configuration.
        backend: None if it is not known yet.
    """
    problems = []
    for option, ours, theirs in (
        ("tool_call_parser", TOOL_FORMATS, tool_parser_names()),
        ("reasoning_parser", REASONING_FORMATS, reasoning_parser_names()),
    ):
        name, source = getattr(configuration.settings, option), configuration.sources[option]
        text = _problem(name, sorted(ours), sorted(theirs), backend)
        if text is not None:
            text = f"{key_of(option)} = {name!r} ({source.location}): {text}"
            problems.append(Problem(text, option, source))
    return problems


def _problem(
    name: str | None, ours: Sequence[str], theirs: Sequence[str], backend: BackendName | None
) -> str | None:
    vllms = of_vllm(name, ours)
    if name is None or vllms is None:
        return None
    allowed = f"allowed: {', '.join(ours)}"
    if vllms in theirs:
        if backend != "rolling":
            return None
        return f"this is a parser of vLLM, and vLLM is not what serves this model; {allowed}"
    usable = [] if backend == "rolling" else [one for one in theirs if one not in ours]
    if usable:
        allowed += f"; by vLLM, where it serves: {', '.join(usable)}"
    elif not theirs:
        allowed += f"; vLLM has more ({PREFIX}hermes forces one of its own), but is not installed"
    near = difflib.get_close_matches(vllms.lower(), [*ours, *usable], n=1)
    return f"there is no such parser{f'; did you mean {near[0]}?' if near else ''}; {allowed}"
