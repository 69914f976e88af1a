"""A backend before anything is loaded: what it says of a model and of a machine, and what makes its engine."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from properties.problem import Problem

if TYPE_CHECKING:
    from engine.machine import Machine
    from handlers.backends.base import Engine, Lifecycle
    from properties.configuration import Configuration

T = TypeVar("T")

Starting = Callable[[], Coroutine[Any, Any, T]]
"""Returns something loaded, which can answer. If that fails, nothing is left running.

Raises ServingError, with the remedy.
"""


@dataclass
class Findings:
    """What is wrong with a model.

    Attributes:
        errors: Why it cannot be served.
        warnings: What will not work.
    """

    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)

    def add(self, texts: Iterable[str]) -> None:
        """Add errors that concern the model itself."""
        self.errors += [Problem(text, "model_id") for text in texts]


@dataclass(frozen=True)
class Needs:
    """What a model would need on this machine, according to a backend.

    Attributes:
        dtype: Of the weights.
        dtype_reason: Why this one, for people.
        shapes: config.json, with the defaults filled in.
        token_bytes: Keys and values of one token; None if they follow from the shapes.
        image_bytes: Bytes kept for each image of a running request.
        beside_weights: Bytes of what is held beside the weights.
        graphs: Bytes kept free for CUDA graphs, where one device serves a replica.
        takes_all: Whether the cache is as large as it was asked to be, even if nothing can fill it.
        encoder_cache: Whether option.encoder_cache_mb has an effect.
        errors: Why it cannot be served.
        warnings: What else the operator should know.
    """

    dtype: str
    dtype_reason: str
    shapes: Mapping[str, Any]
    token_bytes: int | None = None
    image_bytes: int | None = None
    beside_weights: int = 0
    graphs: int = 0
    takes_all: bool = False
    encoder_cache: bool = True
    errors: Sequence[Problem] = ()
    warnings: Sequence[Problem] = ()


@dataclass(frozen=True)
class DevicePlan:
    """How many replicas are started, each on `per_replica` of the `available` devices on `machines` machines."""

    replicas: int
    per_replica: int
    available: int
    machines: int = 1
    warnings: Sequence[Problem] = ()


@dataclass(frozen=True)
class PromptCheck:
    """What `lmi check` reports about prompts.

    Attributes:
        template: Which chat template is used, for people; None if it was not determined.
        image_tokens: The tokens of an image of a size such as "336x336", None for a size that the model does not
            accept. The whole is None for a model without images.
        errors: What would fail.
        warnings: What else the operator should know.
    """

    template: str | None = None
    image_tokens: Mapping[str, int | None] | None = None
    errors: Sequence[Problem] = ()
    warnings: Sequence[Problem] = ()


class Backend(Protocol):
    """A backend before anything is loaded: what it says of a model and a machine, and what makes its engine.

    Unless a method says otherwise, neither torch nor transformers nor the engine is imported.
    """

    takes_engine_arguments: bool
    """Whether unknown options are passed to its engine by their own names and checked there."""

    def parser_names(self, option: str) -> Set[str]:
        """Return the names of its own parsers for that option, "tool_call_parser" or "reasoning_parser"."""

    def build(self, configuration: Configuration, model_path: Path) -> Starting[Engine[Any]]:
        """Return what starts the engine. Slow, since it imports what it needs. Raises ServingError."""

    def part(self, configuration: Configuration, model_path: Path) -> Starting[Lifecycle] | None:
        """Return what starts this machine's part when another one answers requests; None if this one answers."""

    def examine(
        self,
        found: Findings,
        configuration: Configuration,
        directory: Path,
        config: Mapping[str, Any],
        contents: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Add this backend's objections to a model and to its weights, as far as their headers show.

        contents: the JSON files that are complete.
        """

    def chat_template(self, config: Mapping[str, Any]) -> object:
        """Return the template of the model's family, for a model without one; None if there is none."""

    def plan(
        self, configuration: Configuration, directory: Path, machine: Machine, shapes: Mapping[str, Any]
    ) -> DevicePlan:
        """Return replicas and their devices. shapes: see `Needs`. Raises InvalidConfiguration for too few devices."""

    def estimate(
        self, configuration: Configuration, directory: Path, config: Mapping[str, Any], machine: Machine
    ) -> Needs:
        """Return how much memory the model needs. May import torch and transformers."""

    def refused_options(self, configuration: Configuration, directory: Path | None, machine: Machine) -> list[Problem]:
        """Return what the engine itself refuses before it loads a model. May import the engine.

        Args:
            configuration: The options.
            directory: The model's; None if it is not on this machine yet.
            machine: Where the engine would run.
        """

    def check_prompts(self, configuration: Configuration, directory: Path, machine: Machine) -> PromptCheck:
        """Return what a start would find out about prompts and images. Slow: it may start a process."""
