"""What an option is, beyond its type: one small record kept with each field of the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

from pydantic import Field

BackendName = Literal["rolling", "vllm"]
BOTH: tuple[BackendName, ...] = ("rolling", "vllm")
VLLM: tuple[BackendName, ...] = ("vllm",)
ROLLING: tuple[BackendName, ...] = ("rolling",)


class Level(IntEnum):
    """Where a value can come from; a lower number wins over a higher one."""

    COMMAND_LINE = 0
    SAGEMAKER = 1
    FILE = 2
    ENVIRONMENT = 3
    CONTAINER = 4
    DEDICATED = 5
    TGI = 6
    RECOMMENDED = 7
    DEFAULT = 8


@dataclass(frozen=True)
class Variable:
    """An environment variable with a name of its own (not OPTION_* or SERVING_*) that sets an option.

    convert: turns the variable's text into the option's text; raises ValueError saying what is allowed.
    rank: among variables of one level, a lower rank wins; variables of the same rank must agree.
    instead: what to write instead when the variable is deprecated.
    """

    name: str
    level: Level = Level.DEDICATED
    convert: Callable[[str], str] = str
    rank: int = 0
    instead: str | None = None


@dataclass(frozen=True)
class Option:
    """Facts about one option.

    server: written without the `option.` prefix and set by SERVING_* instead of OPTION_*.
    aliases: other names, written like the option's own (`option.<alias>`, OPTION_<ALIAS>).
    variables: environment variables with names of their own.
    replaced: values that are still understood, with what they mean now; each use is a warning.
    secret: the value is never shown.
    verbatim: spaces at the value's ends belong to it.
    unit: of the number, for people.
    embedded: the only values that the embedded engine obeys; empty for all.
    """

    meaning: str
    backends: tuple[BackendName, ...]
    server: bool
    aliases: tuple[str, ...]
    variables: tuple[Variable, ...]
    replaced: tuple[tuple[str, str], ...]
    secret: bool
    verbatim: bool
    unit: str | None
    embedded: tuple[str, ...]


def option(
    meaning: str,
    *,
    default: Any,
    backends: tuple[BackendName, ...] = BOTH,
    server: bool = False,
    aliases: tuple[str, ...] = (),
    variables: tuple[Variable, ...] = (),
    replaced: tuple[tuple[str, str], ...] = (),
    secret: bool = False,
    verbatim: bool = False,
    unit: str | None = None,
    embedded: tuple[str, ...] = (),
) -> Any:
    """A field of the settings: see `Option` for the arguments."""
    field = Field(default=default)
    field.metadata.append(
        Option(
            meaning=meaning,
            backends=backends,
            server=server,
            aliases=aliases,
            variables=variables,
            replaced=replaced,
            secret=secret,
            verbatim=verbatim,
            unit=unit,
            embedded=embedded,
        )
    )
    return field


def server_key(meaning: str, *, default: Any, **facts: Any) -> Any:
    """A field that belongs to the HTTP server or the process: written without `option.`, set by SERVING_*."""
    return option(meaning, default=default, server=True, **facts)
