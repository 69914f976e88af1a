"""From a configuration and a model directory to the engine and the image loader."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from handlers.backends.backend import Backend, Starting
from handlers.backends.base import Engine, Lifecycle
from handlers.backends.image_options import contradictions
from handlers.backends.model_files import model_findings
from handlers.backends.select import Choice, backend_of, choose_for, vllm_installed
from handlers.backends.vllm.compat import parser_names
from handlers.images.limits import ImageLimits
from handlers.images.loader import ImageLoader
from handlers.parsers.select import REASONING_FORMATS, TOOL_FORMATS, VLLM_PARSER, of_vllm
from properties.configuration import Configuration, read_model_config
from properties.problem import ConfigurationError, Problem
from properties.settings import Settings

logger = logging.getLogger(__name__)


def with_model_directory(configuration: Configuration, directory: Path) -> Configuration:
    """Return the configuration with what the fetched model's own files add. Warnings that are new are logged."""
    known = {problem.message for problem in configuration.warnings}
    configuration = configuration.with_model_directory(directory)
    for problem in configuration.warnings:
        if problem.message not in known:
            logger.warning("%s", problem)
    return configuration


def choose_backend(configuration: Configuration, model_path: Path) -> Choice:
    """Return which backend serves, and why. Raises ConfigurationError.

    It is slow if vLLM is installed and torch has not been imported yet.
    """
    config = read_model_config(model_path) or {}
    return choose_for(configuration, config, _accelerators() if vllm_installed() else 0)


def _accelerators() -> int:
    # Imports torch, which the embedded engine's front end does not need.
    from engine.machine import this_machine

    return len(this_machine().accelerators)


def build_part(configuration: Configuration, model_path: Path, choice: Choice) -> Starting[Lifecycle] | None:
    """Return what starts this machine's part of a model for which another one answers; None on all other machines.

    Raises as `build_engine` does.
    """
    part = backend_of(choice.backend).part(configuration, model_path)
    if part is not None:
        _examine(configuration, model_path, choice)
    return part


def build_engine(configuration: Configuration, model_path: Path, choice: Choice | None = None) -> Starting[Engine[Any]]:
    """Check the model, and return what starts the engine that serves it.

    It is slow, because it imports what it needs; call it in a thread.

    Args:
        configuration: The options.
        model_path: The model's directory.
        choice: What `choose_backend` returned; None to choose here.

    Raises:
        ConfigurationError: The options do not fit the model or the machine.
        ServingError: The model cannot be served.
    """
    choice = choice or choose_backend(configuration, model_path)
    _examine(configuration, model_path, choice)
    return backend_of(choice.backend).build(configuration, model_path)


def _examine(configuration: Configuration, model_path: Path, choice: Choice) -> None:
    """Log what will not work. Raises ConfigurationError for a model that cannot be served."""
    backend = backend_of(choice.backend)
    if problems := parser_problems(configuration, backend):
        raise ConfigurationError(problems)
    found = model_findings(configuration, model_path, backend)
    wrong = [Problem(text) for text in contradictions(configuration.settings, model_path, None)]
    if problems := [*found.errors, *wrong]:
        raise ConfigurationError(problems)
    logger.info("backend %s: %s", choice.backend, choice.reason)
    for problem in [*configuration.without_effect(choice.backend), *found.warnings]:
        logger.warning("%s", problem)


def build_images(settings: Settings) -> ImageLoader:
    """Return the image loader with the limits that the options set."""
    return ImageLoader(ImageLimits.of(settings))


def parser_problems(configuration: Configuration, backend: Backend | None = None) -> list[Problem]:
    """Report configured parsers that do not exist, or that the backend cannot use.

    Args:
        configuration: The configuration.
        backend: None if it is not known yet.
    """
    problems = []
    for option, ours in (("tool_call_parser", TOOL_FORMATS), ("reasoning_parser", REASONING_FORMATS)):
        theirs = parser_names(option)
        usable = theirs if backend is None else backend.parser_names(option)
        name = getattr(configuration.settings, option)
        text = _parser_problem(name, sorted(ours), sorted(theirs), usable)
        if text is not None:
            problems.append(Problem(f"{configuration.assigned(option)}: {text}", option))
    return problems


def _parser_problem(name: str | None, ours: Sequence[str], theirs: Sequence[str], usable: Set[str]) -> str | None:
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
        allowed += f"; vLLM has more ({VLLM_PARSER}hermes forces one of its own), but is not installed"
    near = difflib.get_close_matches(vllms.lower(), [*ours, *others], n=1)
    return f"there is no such parser{f'; did you mean {near[0]}?' if near else ''}; {allowed}"
