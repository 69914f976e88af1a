"""From a configuration and a model directory to the backend and the picture loader."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path

from handlers.backends.base import Backend
from handlers.backends.model_files import model_findings
from handlers.backends.select import Choice, choose_for, vllm_installed
from handlers.backends.vision_flags import contradictions
from handlers.backends.vllm.options.plan import follows
from handlers.images.loader import ImageLimits, ImageLoader
from handlers.parsers.names import parser_problems
from properties.configuration import Configuration, read_model_config
from properties.field import BackendName
from properties.problem import ConfigurationError, Problem
from properties.settings import Settings

logger = logging.getLogger(__name__)

_BACKENDS: dict[BackendName, tuple[str, str]] = {
    "rolling": ("handlers.backends.rolling.backend", "RollingBackend"),
    "vllm": ("handlers.backends.vllm.backend", "VllmBackend"),
}
"""Module and class of each, imported only when it is the one that serves."""

_FOLLOWER = ("handlers.backends.vllm.nodes.follower", "VllmFollower")
"""Of a machine that holds a part of the model for another."""


def choose_backend(configuration: Configuration, model_path: Path) -> Choice:
    """Slow where vLLM is installed and torch not imported yet. Raises ConfigurationError."""
    config = read_model_config(model_path) or {}
    return choose_for(configuration, config, _accelerators() if vllm_installed() else 0)


def _accelerators() -> int:
    # Imports torch, which the front of the embedded engine does without.
    from engine.machine import this_machine

    return len(this_machine().accelerators)


def build_backend(configuration: Configuration, model_path: Path) -> Backend:
    """The backend that serves the model, not yet loaded. Slow: imports what it needs; call it in a thread.

    Raises ConfigurationError and ServingError.
    """
    choice = choose_backend(configuration, model_path)
    if problems := parser_problems(configuration, choice.backend):
        raise ConfigurationError(problems)
    found = model_findings(configuration, model_path, choice.backend)
    wrong = [Problem(text) for text in contradictions(configuration.settings, model_path, None)]
    if problems := [*found.errors, *wrong]:
        raise ConfigurationError(problems)
    logger.info("backend %s: %s", choice.backend, choice.reason)
    for problem in [*configuration.without_effect(choice.backend), *found.warnings]:
        logger.warning("%s", problem)
    module, name = _BACKENDS[choice.backend]
    if choice.backend == "vllm" and follows({name: item.value for name, item in configuration.extra.items()}):
        module, name = _FOLLOWER
    backend: Backend = getattr(import_module(module), name).from_configuration(configuration, model_path)
    return backend


def build_images(settings: Settings) -> ImageLoader:
    return ImageLoader(ImageLimits.of(settings))
