"""Which model is served, where it is, and what its JSON files say."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SCRIPTS = ("model.py", "code/model.py")
"""Where a model's own code may lie."""

_ARTEFACTS = ("config.json", "params.json", *SCRIPTS)

LMI_NAME = "model"
"""LMI's name for the model in /opt/ml/model, which its clients use in /predictions/model."""


@dataclass(frozen=True)
class ModelLocation:
    """What to serve.

    Attributes:
        kind: "directory" (value is a path), "hub" (an id) or "s3" (a URL).
        value: The path, id or URL.
        name: Name in routes such as /predictions/{name}: letters, digits and `_`, as LMI forms it.
        revision: Branch, tag or commit of a hub model.
    """

    kind: Literal["directory", "hub", "s3"]
    value: str
    name: str
    revision: str | None = None


def locate(model_id: str, revision: str | None, home: Path | None) -> ModelLocation:
    """Distinguish a directory, a hub id and an S3 URL; a relative path is looked for in `home` first.

    Raises:
        ValueError: It is none of these; the message says what is allowed.
    """
    if model_id.startswith("s3://"):
        return ModelLocation("s3", model_id, _name(model_id.rstrip("/").rpartition("/")[2]))
    for path in ([home / model_id] if home else []) + [Path(model_id)]:
        if os.path.isdir(path):
            return ModelLocation("directory", str(path), _name(path.resolve().name))
    if model_id.startswith(("/", "./", "../", "~")):
        raise ValueError("no such directory")
    if not _HUB_ID.fullmatch(model_id):
        raise ValueError("allowed: a directory, a hub id such as org/name, or s3://bucket/prefix/")
    return ModelLocation("hub", model_id, _name(model_id), revision)


def find_home(model: str | None, named: str | None, store: Path) -> Path | None:
    """Return the directory whose serving.properties, model.py and adapters/ are used; None if there is none.

    Args:
        model: The command line's MODEL.
        named: A model id from the environment or an --option.
        store: Directory in which SageMaker puts models.

    Raises:
        ValueError: The store holds several models and none is named.
    """
    if model is not None:
        return Path(model) if os.path.isdir(model) else None
    entries = _visible(store)
    if (store / "serving.properties").is_file():
        return store
    if named is not None and os.path.isdir(named):
        return Path(named)
    if not entries:
        return None
    if named is None and all(entry.is_dir() for entry in entries):
        if len(entries) > 1:
            names = ", ".join(sorted(entry.name for entry in entries))
            raise ValueError(f"{store} holds several models ({names}); name one as MODEL, or set multi_model=true")
        return entries[0]
    return store


def holds_model(directory: Path) -> bool:
    """Tell whether the directory holds something that can be served."""
    return any((directory / name).is_file() for name in _ARTEFACTS)


def _visible(store: Path) -> Sequence[Path]:
    try:
        return [entry for entry in store.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return []


def _name(text: str) -> str:
    return re.sub(r"\W", "_", text) or "model"


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in one of a model's files, in which Infinity and NaN are numbers.

    transformers writes them, too (`model_max_length`, limits in a config).

    Raises:
        OSError: The file cannot be read.
        ValueError: It does not contain a JSON object.
    """
    try:
        value = json.loads(file.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the language model's part of a config.json: text_config (or llm_config), or all of it."""
    for name in ("text_config", "llm_config", "language_config"):
        part = config.get(name)
        if isinstance(part, Mapping):
            return part
    return config


def model_dtype(config: Mapping[str, Any]) -> str | None:
    """Return float32, float16 or bfloat16 if config.json names one of them."""
    for part in (config, text_config(config)):
        for name in ("dtype", "torch_dtype"):
            value = part.get(name)
            if value in ("float32", "float16", "bfloat16"):
                return str(value)
    return None


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the number of positions for which the language model was made."""
    for part in (text_config(config), config):
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
            value = part.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return None
