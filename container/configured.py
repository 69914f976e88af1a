"""The configuration as a command makes it: its own defaults hold where no source says otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from handlers.backends.vllm.options.fields import engine_argument_names
from properties.configuration import Configuration, resolve
from properties.field import Level
from properties.problem import DEFAULT

SERVE_DEFAULTS = {"host": "127.0.0.1"}
RUN_DEFAULTS = {"host": "127.0.0.1", "port": "2242"}
"""Of `lmi serve` and `lmi run`: option -> value; the latter's is Aphrodite's port."""


def configured(
    model: str | None, options: Sequence[str], environ: Mapping[str, str], defaults: Mapping[str, str]
) -> Configuration:
    """As `resolve`; defaults: option -> value where no source says. Raises ConfigurationError."""
    known = engine_argument_names()
    found = resolve(model=model, environ=environ, options=options, backend_options=known)
    unsaid = [name for name in defaults if found.sources[name].level is Level.DEFAULT]
    if unsaid:
        options = [*options, *(f"{name}={defaults[name]}" for name in unsaid)]
        found = resolve(model=model, environ=environ, options=options, backend_options=known)
        found = replace(found, sources=found.sources | dict.fromkeys(unsaid, DEFAULT))
    return found
