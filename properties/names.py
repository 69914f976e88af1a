"""The names that options are written by, and the nearest known name to an unknown one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

from properties.field import Level
from properties.settings import options

PREFIX = "option."

KEYS: dict[str, str] = {
    spelling if facts.server else PREFIX + spelling: name
    for name, _, facts in options()
    for spelling in (name, *facts.aliases)
}
"""Key of serving.properties -> attribute of `Settings`."""

FACTS = {name: facts for name, _, facts in options()}
"""Attribute of `Settings` -> what the schema says about it."""

_BY_SPELLING = {key.removeprefix(PREFIX): key for key in KEYS}

# A key that somebody wrote and nobody read would leave the server open.
KEYS |= {PREFIX + name: name for name, facts in FACTS.items() if facts.server and facts.secret}


def key_of(name: str) -> str:
    """An attribute's key in serving.properties, e.g. "dtype" -> "option.dtype"."""
    return name if FACTS[name].server else PREFIX + name


def environment_name(name: str) -> str:
    """An attribute's environment variable, e.g. "dtype" -> "OPTION_DTYPE"."""
    return ("SERVING_" if FACTS[name].server and name != "engine" else "OPTION_") + name.upper()


def key_from_environment(variable: str) -> str | None:
    """OPTION_DTYPE -> "option.dtype", SERVING_PORT -> "port"; None for any other variable.

    As in LMI, the rest of an OPTION_ name is lowered only if it has no lower-case letter.
    """
    if variable.startswith("SERVING_"):
        return variable.removeprefix("SERVING_").lower()
    if not variable.startswith("OPTION_"):
        return None
    rest = variable.removeprefix("OPTION_")
    if re.fullmatch(r"[A-Z_\d]+", rest):
        rest = rest.lower()
    return rest if rest == "engine" else PREFIX + rest


def key_from_command_line(name: str) -> str:
    """A command-line name may be written with or without `option.`."""
    return name if name in KEYS else _BY_SPELLING.get(name.removeprefix(PREFIX), PREFIX + name)


def nearest(key: str, level: Level, more: Collection[str] = ()) -> str | None:
    """The known name most like an unknown key, spelled as at that level; None if nothing is like it.

    more: names that a backend knows beside the schema's, without `option.`.
    """
    bare = key.removeprefix(PREFIX)
    found = difflib.get_close_matches(bare.lower(), [*_BY_SPELLING, *sorted(more)], n=1, cutoff=0.7)
    if not found:
        return None
    if found[0] not in _BY_SPELLING:
        name = found[0]
        spelled = {
            Level.ENVIRONMENT: "OPTION_" + name.upper(),
            Level.CONTAINER: "SM_VLLM_" + name.upper(),
            Level.COMMAND_LINE: name,
        }
        return spelled.get(level, PREFIX + name)
    known = _BY_SPELLING[found[0]]
    if level is Level.CONTAINER:
        return "SM_VLLM_" + found[0].upper()
    if level is Level.ENVIRONMENT:
        own = environment_name(KEYS[known])
        return own if found[0] != found[0].lower() else own.partition("_")[0] + "_" + found[0].upper()
    return found[0] if level is Level.COMMAND_LINE else known
