"""Which model is to be served, and where it lies."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ARTEFACTS = ("config.json", "params.json", "model.py")


@dataclass(frozen=True)
class ModelLocation:
    """What to serve.

    kind: "directory" (value is a path), "hub" (an id) or "s3" (a URL).
    name: the model's name in routes such as /predictions/{name}: as LMI forms it, letters, digits and `_`.
    """

    kind: Literal["directory", "hub", "s3"]
    value: str
    name: str
    revision: str | None = None


def locate(model_id: str, revision: str | None, home: Path | None) -> ModelLocation:
    """Tell a directory, a hub id and an S3 URL apart; a relative path is looked for in `home` first.

    Raises ValueError saying what is allowed.
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
    """The directory whose serving.properties, model.py and adapters/ count; None where there is none.

    model: the command line's MODEL. named: a model id from the environment or an --option.
    Raises ValueError when the store holds several models and none is named.
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
            raise ValueError(
                f"{store} holds several models ({names}); this server serves one: name it as MODEL"
            )
        return entries[0]
    return store


def holds_model(directory: Path) -> bool:
    """Whether something in the directory can be served."""
    return any((directory / name).is_file() for name in _ARTEFACTS)


def _visible(store: Path) -> Sequence[Path]:
    try:
        return [entry for entry in store.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return []


def _name(text: str) -> str:
    return re.sub(r"\W", "_", text) or "model"
