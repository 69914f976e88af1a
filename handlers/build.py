"""From a configuration and a model directory to the backend and the image loader."""

from __future__ import annotations

import logging
from pathlib import Path

from handlers.backends.base import Lifecycle
from handlers.backends.model_files import model_findings
from handlers.backends.select import Choice, backend_of, choose_for, vllm_installed
from handlers.backends.vision_flags import contradictions
from handlers.images.limits import ImageLimits
from handlers.images.loader import ImageLoader
from handlers.parsers.names import parser_problems
from handlers.pipeline import Pipeline
from properties.configuration import Configuration, read_model_config
from properties.problem import ConfigurationError, Problem
from properties.settings import Settings

logger = logging.getLogger(__name__)


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


def build_part(configuration: Configuration, model_path: Path, choice: Choice) -> Lifecycle | None:
    """Return what runs on a machine that holds a part of the model for another one; None on all other machines.

    It is not loaded yet. Raises as `build_backend` does.
    """
    part = backend_of(choice.backend).part(configuration, model_path)
    if part is not None:
        _examine(configuration, model_path, choice)
    return part


def build_backend(configuration: Configuration, model_path: Path, choice: Choice | None = None) -> Pipeline:
    """Return the engine that serves the model, with its pipeline, not loaded yet.

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
    engine = backend_of(choice.backend).build(configuration, model_path)
    return Pipeline(engine, configuration.settings.guided_decoding_timeout)


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
