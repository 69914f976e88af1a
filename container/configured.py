"""The configuration as a command makes it: its own defaults hold where no source says otherwise."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from handlers.backends.vllm.options.fields import engine_argument_names
from properties.configuration import Configuration, resolve
from properties.field import Level
from properties.problem import DEFAULT, ConfigurationError, Problem

SERVE_DEFAULTS = {"host": "127.0.0.1"}
RUN_DEFAULTS = {"host": "127.0.0.1", "port": "2242"}
"""Of `lmi serve` and `lmi run`: option -> value; the latter's is Aphrodite's port."""


def configured(
    model: str | None, options: Sequence[str], environ: Mapping[str, str], defaults: Mapping[str, str]
) -> Configuration:
    """As `resolve`; defaults: option -> value where no source says. Raises ConfigurationError, also for what the
    operating system does not let us read."""

    def resolved(options: Sequence[str]) -> Configuration:
        try:
            return resolve(
                model=model, environ=environ, options=options, backend_options=engine_argument_names()
            )
        except OSError as error:
            raise ConfigurationError([unreadable(error)]) from error

    found = resolved(options)
    unsaid = [name for name in defaults if found.sources[name].level is Level.DEFAULT]
    if unsaid:
        found = resolved([*options, *(f"{name}={defaults[name]}" for name in unsaid)])
        found = replace(found, sources=found.sources | dict.fromkeys(unsaid, DEFAULT))
    return found


def unreadable(error: OSError) -> Problem:
    """A file that cannot be had, as a problem."""
    where = f"{error.filename}: " if error.filename is not None else ""
    return Problem(
        f"{where}{error.strerror or error}; let user {os.getuid()} read the model's directory", "model_id"
    )
