"""Builds what serves a model: its backend, and the service that answers requests with it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from container.state import Answers
from handlers.backends.backend import Starting
from handlers.backends.base import Lifecycle
from handlers.backends.select import Choice
from handlers.build import build_engine, build_part, choose_backend
from handlers.custom.backend import CustomBackend
from handlers.custom.find import find_formatters, find_handler, find_unused
from handlers.custom.formatters import Formatters
from handlers.custom.service import CustomService
from handlers.images.loader import ImageLoader
from handlers.parsers.select import answer_formats
from handlers.pipeline import Pipeline
from handlers.request import Observer
from handlers.service import Service, gates
from properties.configuration import Configuration

logger = logging.getLogger(__name__)


ServiceMaker = Callable[[Any, Configuration, ImageLoader, Observer, Formatters | None], Answers]
"""Makes the service that answers requests with a loaded backend and, if there are any, loaded formatters."""


@dataclass(frozen=True, slots=True)
class Served:
    """What serves a model.

    Attributes:
        start: Returns the backend, loaded.
        service: Makes what answers requests with it; None if another machine answers them.
        choice: The backend and why it serves; None if the model's own code answers.
    """

    start: Starting[Lifecycle]
    service: ServiceMaker | None
    choice: Choice | None = None

    @classmethod
    def by(cls, start: Starting[Any], pipeline: Callable[[Any], Pipeline], choice: Choice | None = None) -> Served:
        """Return an engine that answers requests on this machine. pipeline: puts a pipeline in front of it."""
        return cls(start, partial(_service, pipeline), choice)


def build_backend(configuration: Configuration, model_path: Path) -> Served:
    """Return the model's own handler if it has one, or else an engine; neither is started yet.

    It is slow, because it imports what it needs; call it in a thread.

    Raises:
        ConfigurationError: The options do not fit the model or the machine.
        ServingError: The model cannot be served.
    """
    own = find_handler(configuration, model_path)
    if own is None:
        if (unused := find_unused(configuration, model_path)) is not None:
            named = configuration.lmi_handler
            logger.warning(
                "%s of the model is not used: %s",
                unused.name,
                f"it defines neither {configuration.settings.handler} nor a formatter"
                if named is None
                else f"option.entryPoint names {named}",
            )
        choice = choose_backend(configuration, model_path)
        part = build_part(configuration, model_path, choice)
        if part is not None:
            return Served(part, None)
        seconds = configuration.settings.guided_decoding_timeout
        start_engine = build_engine(configuration, model_path, choice)
        return Served.by(start_engine, lambda engine: Pipeline(engine, seconds), choice)
    logger.warning("%s of the model answers requests; no engine is started", own.file)
    backend = CustomBackend.from_configuration(configuration, model_path, own)

    async def start() -> CustomBackend:
        await backend.load()
        return backend

    return Served(start, _custom_service)


def build_formatters(configuration: Configuration, model_path: Path) -> Formatters | None:
    """Return the model's own formatters, not loaded yet. Raises ServingError."""
    own = find_formatters(configuration, model_path)
    if own is None:
        return None
    logger.warning("formatters in %s of the model change requests or replies", own.file)
    processes = CustomBackend.from_configuration(configuration, model_path, own)
    return Formatters(processes, reads=own.reads, writes=own.writes)


def _custom_service(
    backend: CustomBackend,
    configuration: Configuration,
    images: ImageLoader,
    observer: Observer,
    formatters: Formatters | None,
) -> Answers:
    return CustomService(backend, configuration.settings, observer)


def _service(
    make_pipeline: Callable[[Any], Pipeline],
    engine: Any,
    configuration: Configuration,
    images: ImageLoader,
    observer: Observer,
    formatters: Formatters | None,
) -> Answers:
    settings, pipeline = configuration.settings, make_pipeline(engine)
    return Service(
        pipeline,
        images,
        settings,
        model_name=configuration.public_names[0],
        other_names=configuration.accepted_names,
        formats=pipeline.capabilities.formats
        or answer_formats(settings.tool_call_parser, settings.enable_auto_tool_choice, settings.reasoning_parser),
        gates=gates(settings),
        formatters=formatters,
        observer=observer,
    )
