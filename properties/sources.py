"""Reading the places where options are written; nothing is judged here but whether they can be read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import javaproperties

from properties.field import Level, Variable
from properties.names import FACTS, key_from_command_line, key_from_environment, key_of
from properties.problem import Problem

FILE_NAME = "serving.properties"


@dataclass(frozen=True)
class Written:
    """One value as someone wrote it.

    key: as in serving.properties, e.g. "option.dtype"; not necessarily a known one.
    raw: the text, never empty. location: see `Source.location`.
    rank: among values of one level, those of the lowest rank count.
    name: what somebody wrote, where the key is that of another option, for which it stands.
    """

    level: Level
    key: str
    raw: str
    location: str
    rank: int = 0
    variable: Variable | None = None
    name: str | None = None


def read_command_line(options: Sequence[str], problems: list[Problem]) -> Iterator[Written]:
    """`--option key=value` arguments, as "key=value"; an option written as a flag of its own is "--key=value"."""
    for text in options:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            problems.append(Problem(f"--option {text}: allowed: NAME=VALUE"))
        elif value.strip():
            name = name.strip()
            flag = name.startswith("--")
            key = key_from_command_line(name.removeprefix("--").replace("-", "_") if flag else name)
            yield Written(Level.COMMAND_LINE, key, value, name if flag else f"--option {name}")


def read_environment(environ: Mapping[str, str]) -> Iterator[Written]:
    """OPTION_*, SERVING_* and the variables with names of their own. Empty ones are absent."""
    for variable, value in environ.items():
        key = key_from_environment(variable)
        if key is not None and key != "option." and value.strip():
            yield Written(Level.ENVIRONMENT, key, value, variable)
    for name, facts in FACTS.items():
        for own in facts.variables:
            value = environ.get(own.name, "")
            if value.strip():
                yield Written(own.level, key_of(name), value, own.name, own.rank, own)


def read_file(
    path: Path, problems: list[Problem], warnings: list[Problem], level: Level = Level.FILE
) -> Iterator[Written]:
    """A file in Java's properties syntax: UTF-8, or Latin-1 where it is not valid UTF-8.

    Of a key that is written twice the later one counts, as in Java, with a warning.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        problems.append(Problem(f"{path.name} cannot be read: {error.strerror}"))
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    found: dict[str, Written] = {}
    line = 1
    try:
        for element in javaproperties.parse(text):
            if isinstance(element, javaproperties.KeyValue):
                location = f"{path.name} line {line}"
                before = found.pop(element.key, None)
                if before is not None:
                    warnings.append(
                        Problem(f"{element.key} is written twice; {location} counts, not {before.location}")
                    )
                found[element.key] = Written(level, element.key, element.value, location)
            line += len(re.findall(r"\r\n|\r|\n", element.source))
    except javaproperties.InvalidUEscapeError as error:
        problems.append(
            Problem(f"{path.name} line {line}: {error} (a backslash must be written twice in this file)")
        )
    yield from (written for written in found.values() if written.raw.strip())
