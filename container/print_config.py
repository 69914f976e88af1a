"""`lmi serve --print-config`: the serving.properties that reproduces a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import javaproperties

from handlers.backends.vllm.options.fields import SECRET
from properties.configuration import Configuration
from properties.field import Level
from properties.names import FACTS, PREFIX, key_of


def as_properties(configuration: Configuration) -> str:
    """Every option that somebody set, in Java's properties syntax. Secrets, and options that nobody knows, which may
    be secrets misspelt, are named in comments and left out."""
    lines = []
    for name, source in configuration.sources.items():
        if source.level >= Level.RECOMMENDED:
            continue
        if FACTS[name].secret:
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
    # Java's writer would escape what is not ASCII; the reader takes UTF-8.
    return javaproperties.join_key_value(key, value, ensure_ascii=False)
