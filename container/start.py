"""From the command line to a running server: read the configuration, set up the log, report what is wrong."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence

from container.logs import logging_to
from container.server import BackendBuilder, serve
from handlers.backends.vllm.fields import engine_argument_names
from handlers.build import build_backend
from properties.configuration import Configuration, resolve
from properties.field import Level
from properties.problem import ConfigurationError

logger = logging.getLogger(__name__)


def start(
    model: str | None,
    options: Sequence[str],
    environ: Mapping[str, str],
    default_host: str | None,
    build: BackendBuilder | None = None,
) -> int:
    """Serve to the end; the process's exit status.

    default_host: where to listen when no source of the configuration says; None leaves it to the schema.
    """
    try:
        known = engine_argument_names()
        configuration = resolve(model=model, environ=environ, options=options, backend_options=known)
        if default_host is not None and configuration.sources["host"].level is Level.DEFAULT:
            options = [*options, f"host={default_host}"]
            configuration = resolve(model=model, environ=environ, options=options, backend_options=known)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 1
    with logging_to(form=configuration.settings.log_format):
        _announce(configuration)
        return serve(configuration, build or build_backend)


def _announce(configuration: Configuration) -> None:
    location = configuration.model_location
    logger.info("model %s (%s)", location.value, location.kind)
    for problem in configuration.warnings:
        logger.warning("%s", problem)
