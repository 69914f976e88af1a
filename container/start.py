"""From the command line to a running server: read the configuration, set up the log, report what is wrong."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence

from container.build import build_backend
from container.configured import configured
from container.logs import logging_to
from container.server import BackendBuilder, serve
from processes.environment import forget_keys
from properties.configuration import Configuration
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
        configuration = configured(model, options, environ, defaults)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 1
    forget_keys()
    settings = configuration.settings
    with logging_to(form=settings.log_format, level=settings.log_level):
        _announce(configuration)
        for warning in warnings:
            logger.warning("%s", warning)
        return serve(configuration, build or build_backend)


def _announce(configuration: Configuration) -> None:
    location = configuration.model_location
    logger.info("model %s (%s)", location.value, location.kind)
    for problem in configuration.warnings:
        logger.warning("%s", problem)
