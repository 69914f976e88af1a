"""From the command line to a running server: read the configuration, set up the log, report what is wrong."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence

from container.build import build_backend
from container.logs import logging_to
from container.server import BackendBuilder, serve
from handlers.backends.vllm.options.fields import engine_argument_names
from properties.configuration import Configuration, resolve
from properties.field import Level
from properties.problem import ConfigurationError

logger = logging.getLogger(__name__)


def start(
    model: str | None,
    options: Sequence[str],
    environ: Mapping[str, str],
    defaults: Mapping[str, str],
    warnings: Sequence[str] = (),
    build: BackendBuilder | None = None,
) -> int:
    """Serve to the end; the process's exit status.

    defaults: option -> value where no source of the configuration says. warnings: about the command line.
    """
    try:
        known = engine_argument_names()
        configuration = resolve(model=model, environ=environ, options=options, backend_options=known)
        unsaid = [name for name in defaults if configuration.sources[name].level is Level.DEFAULT]
        if unsaid:
            options = [*options, *(f"{name}={defaults[name]}" for name in unsaid)]
            configuration = resolve(model=model, environ=environ, options=options, backend_options=known)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 1
    with logging_to(form=configuration.settings.log_format):
        _announce(configuration)
        for warning in warnings:
            logger.warning("%s", warning)
        return serve(configuration, build or build_backend)


def _announce(configuration: Configuration) -> None:
    location = configuration.model_location
    logger.info("model %s (%s)", location.value, location.kind)
    for problem in configuration.warnings:
        logger.warning("%s", problem)
