"""How an option is defined: a record beside its field of the settings."""

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

TRUE = frozenset({"true", "1", "yes", "on", "t", "y"})
"""Words that pydantic reads as true, in any case."""


class Level(IntEnum):
    """Where a value can come from; a lower number wins over a higher one. words: for people."""

    words: str

    COMMAND_LINE = 0, "command line"
    SAGEMAKER = 1, "SageMaker variable"
    FILE = 2, "serving.properties"
    ENVIRONMENT = 3, "environment option"
    CONTAINER = 4, "vLLM or SGLang container variable"
    DEDICATED = 5, "environment variable"
    TGI = 6, "TGI variable"
    RECOMMENDED = 7, "recommended from config.json"
    DEFAULT = 8, "default"

    def __new__(cls, number: int, words: str) -> Level:
        level = int.__new__(cls, number)
        level._value_, level.words = number, words
        return level


@dataclass(frozen=True)
class Variable:
    """An environment variable with its own name (not OPTION_* or SERVING_*) that sets an option.

    Attributes:
        name: Name of the variable.
        level: Where its value ranks.
        convert: Converts the variable's text to the option's text; raises ValueError saying what is allowed.
        rank: Among variables of one level, a lower rank wins; variables of the same rank must agree.
        instead: What to write instead, if the variable is deprecated.
    """

    name: str
    level: Level = Level.DEDICATED
    convert: Callable[[str], str] = str
    rank: int = 0
    instead: str | None = None


@dataclass(frozen=True)
class Option:
    """The definition of an option.

    Attributes:
        meaning: Description for people.
        backends: Backends that use the option.
        server: Whether it is written without the `option.` prefix and set by SERVING_* instead of OPTION_*.
        aliases: Other names, written like the option's own (`option.<alias>`, OPTION_<ALIAS>).
        variables: Environment variables with their own names.
        replaced: Values that are still understood, with what they mean now; each use is a warning.
        secret: Whether the value is never shown.
        verbatim: Whether spaces at the ends belong to the value.
        unit: Unit of the number, for people.
        embedded: The only values that the embedded engine supports; empty for all.
        needs: The switch without which the option has no effect.
    """

    meaning: str
    backends: tuple[BackendName, ...] = BOTH
    server: bool = False
    aliases: tuple[str, ...] = ()
    variables: tuple[Variable, ...] = ()
    replaced: tuple[tuple[str, str], ...] = ()
    secret: bool = False
    verbatim: bool = False
    unit: str | None = None
    embedded: tuple[str, ...] = ()
    needs: str | None = None


def option(meaning: str, *, default: Any = None, **definition: Any) -> Any:
    """Define a field of the settings; `definition` are the attributes of `Option`."""
    field = Field(default=default)
    field.metadata.append(Option(meaning, **definition))
    return field


def server_key(meaning: str, *, default: Any = None, **definition: Any) -> Any:
    """Define a field of the HTTP server or the process, written without `option.` and set by SERVING_*."""
    return option(meaning, default=default, server=True, **definition)
