"""Names of options: attributes, their keys in files and variables, and the nearest name to a misspelt one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

from properties.field import Level
from properties.settings import options

PREFIX = "option."

KEYS: dict[str, str] = {
    spelling if option.server else PREFIX + spelling: name
    for name, _, option in options()
    for spelling in (name, *option.aliases)
}
"""Key of serving.properties -> attribute of `Settings`."""

OPTIONS = {name: option for name, _, option in options()}
"""Attribute of `Settings` -> its definition."""

_BY_SPELLING = {key.removeprefix(PREFIX): key for key in KEYS}

# An API key under a name that is not read would leave the server open.
KEYS |= {PREFIX + name: name for name, option in OPTIONS.items() if option.server and option.secret}


def by_name(groups: Mapping[str, str], prefix: str = "") -> dict[str, str]:
    """Turn `{value: "name another"}` around: each name, with the prefix, gets its group's value."""
    return {prefix + name: value for value, names in groups.items() for name in names.split()}


def key_of(name: str) -> str:
    """Return an attribute's key in serving.properties, such as "option.dtype" for "dtype"."""
    return name if OPTIONS[name].server else PREFIX + name


def environment_name(name: str) -> str:
    """Return an attribute's environment variable, such as "OPTION_DTYPE" for "dtype"."""
    return ("SERVING_" if OPTIONS[name].server and name != "engine" else "OPTION_") + name.upper()


def key_from_environment(variable: str) -> str | None:
    """Return the key of a variable: "option.dtype" for OPTION_DTYPE, "port" for SERVING_PORT; None for any other.

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
    """Return the key of a command-line name, which may be written with or without `option.`."""
    return name if name in KEYS else _BY_SPELLING.get(name.removeprefix(PREFIX), PREFIX + name)


def nearest(key: str, level: Level, more: Collection[str] = ()) -> str | None:
    """Return the known name that is most similar to an unknown key, spelled as at that level; None if none is similar.

    more: names that a backend knows in addition to the schema's, without `option.`.
    """
    bare = key.removeprefix(PREFIX).lower()
    name = next(iter(difflib.get_close_matches(bare, [*_BY_SPELLING, *sorted(more)], n=1, cutoff=0.7)), None)
    if name is None or level is Level.COMMAND_LINE:
        return name
    if level is Level.CONTAINER:
        return "SM_VLLM_" + name.upper()
    known = _BY_SPELLING.get(name, PREFIX + name)
    if level is not Level.ENVIRONMENT:
        return known
    variable = environment_name(KEYS[known]) if known in KEYS else "OPTION_"
    return variable if name != name.lower() else variable.partition("_")[0] + "_" + name.upper()
