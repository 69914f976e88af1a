"""Where a value came from, and what can be wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from properties.field import Level

MASK = "********"


@dataclass(frozen=True)
class Source:
    """Where a value was written.

    Attributes:
        level: Level of the source.
        location: Description for people, such as "serving.properties line 7" or "OPTION_DTYPE".
        raw: The text as written, masked for a secret; None for a default.
    """

    level: Level
    location: str
    raw: str | None = None

    @property
    def kind(self) -> str:
        return self.level.words

    @property
    def value(self) -> str:
        """The text without the spaces around it."""
        return (self.raw or "").strip()


DEFAULT = Source(Level.DEFAULT, "default")


def assigned(key: str, value: object, location: str) -> str:
    """Return how messages show a value: with its key and where it was written, `option.dtype = half (OPTION_DTYPE)`."""
    return f"{key} = {value} ({location})"


@dataclass(frozen=True)
class Problem:
    """Something wrong or doubtful in the configuration.

    Attributes:
        message: A complete message: it names the option, the value, where it was written and what is allowed.
        option: Attribute of `Settings` at fault, if there is one.
    """

    message: str
    option: str | None = None

    def __str__(self) -> str:
        return self.message


@dataclass
class Report:
    """What was found in a configuration. problems: what is wrong. warnings: what is only doubtful."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def problem(self, message: str, option: str | None = None) -> None:
        self.problems.append(Problem(message, option))

    def warn(self, message: str, option: str | None = None) -> None:
        self.warnings.append(Problem(message, option))


class ConfigurationError(Exception):
    """The configuration cannot be used.

    Attributes:
        problems: Everything that is wrong with it, not only the first problem.
        warnings: What is only doubtful.
    """

    def __init__(self, problems: Sequence[Problem], warnings: Sequence[Problem] = ()) -> None:
        self.problems = list(problems)
        self.warnings = list(warnings)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__("\n".join([f"{head} in the configuration:", *(f"  {p}" for p in self.problems)]))
