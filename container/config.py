"""The configuration that a command uses, with the command's own defaults, and as `--print-config` prints it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import javaproperties

from handlers.backends.vllm.compat import SECRET, engine_argument_names
from properties.configuration import Configuration, resolve
from properties.field import Level
from properties.names import OPTIONS, PREFIX, key_of
from properties.problem import DEFAULT, ConfigurationError, Problem

SERVE_DEFAULTS = {"host": "127.0.0.1", "page": "true"}
RUN_DEFAULTS = {**SERVE_DEFAULTS, "port": "2242"}
"""Defaults of `lmi serve` and `lmi run`, by option. Port 2242 is Aphrodite's."""


def configured(
    model: str | None, options: Sequence[str], environ: Mapping[str, str], defaults: Mapping[str, str]
) -> Configuration:
    """Resolve the configuration.

    Args:
        model: The model's location; None if the options name it.
        options: From the command line, each as NAME=VALUE.
        environ: The environment variables.
        defaults: The values of options that no source sets.

    Raises:
        ConfigurationError: An option is wrong, or a file cannot be read.
    """

    def resolved(options: Sequence[str]) -> Configuration:
        try:
            return resolve(model=model, environ=environ, options=options, backend_options=engine_argument_names())
        except OSError as error:
            raise ConfigurationError([unreadable(error)]) from error

    found = resolved(options)
    missing = [name for name in defaults if found.sources[name].level is Level.DEFAULT]
    if missing:
        found = resolved([*options, *(f"{name}={defaults[name]}" for name in missing)])
        found = replace(found, sources=found.sources | dict.fromkeys(missing, DEFAULT))
    return found


def unreadable(error: OSError) -> Problem:
    """Return the problem that describes a file which cannot be read."""
    where = f"{error.filename}: " if error.filename is not None else ""
    return Problem(f"{where}{error.strerror or error}; let user {os.getuid()} read the model's directory", "model_id")


def as_properties(configuration: Configuration) -> str:
    """Return every option that was set, in the syntax of Java's properties files.

    Secrets are omitted and named in comments, and so are unknown options, which may be misspelt secrets.
    """
    lines = []
    for name, source in configuration.sources.items():
        if source.level >= Level.RECOMMENDED:
            continue
        if OPTIONS[name].secret:
            lines.append(f"# {key_of(name)}: left out, as a secret; it comes from {source.location}")
        else:
            lines.append(_line(key_of(name), _text(_value(configuration, name))))
    for name, item in configuration.extra.items():
        if name in configuration.backend_options - SECRET:
            lines.append(_line(PREFIX + name, str(item.value)))
        else:
            lines.append(f"# {PREFIX}{name}: left out: it is not known, or a secret")
    return "".join(f"{line}\n" for line in lines)


def _value(configuration: Configuration, name: str) -> Any:
    location = configuration.model_location
    if name == "model_id" and location.kind == "directory":
        return str(Path(location.value).resolve())
    return getattr(configuration.settings, name)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value)


def _line(key: str, value: str) -> str:
    # Java's writer escapes everything but ASCII; our reader accepts UTF-8.
    return javaproperties.join_key_value(key, value, ensure_ascii=False)
