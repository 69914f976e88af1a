"""Which directories are LoRA adapters, and which of them a client may name."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from handlers.artefacts.local import local_path
from handlers.errors import InvalidConfiguration, InvalidRequest, NotFound, short_of
from processes.shortage import shortage

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[\w][\w.-]{0,127}", re.ASCII)
_NAME_RULE = "allowed in an adapter's name: letters, digits, `_`, `.` and `-`"
_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


def adapter_directories(home: Path) -> dict[str, Path]:
    """Name -> directory, of each `adapters/<name>/` that holds an adapter. Raises InvalidConfiguration."""
    found: dict[str, Path] = {}
    place = home / "adapters"
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if not path.is_dir() or path.name.startswith("."):
            continue
        if not (path / _CONFIG).is_file():
            raise InvalidConfiguration(f"adapters/{path.name} holds no {_CONFIG}: it is not a LoRA adapter")
        if not _NAME.fullmatch(path.name):
            raise InvalidConfiguration(f"adapters/{path.name[:80]}: {_NAME_RULE}")
        _warn_of_code(path, f"adapters/{path.name}")
        found[path.name] = path
    return found


def check_name(name: str) -> None:
    """Raises InvalidRequest."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"name {name[:80]!r}: {_NAME_RULE}, 128 characters at most", param="name")


def adapter_directory(src: str, home: Path, allowed: str) -> Path:
    """The directory of an adapter that a client names; a relative path is looked for in `home`.

    allowed: the directory below which it may lie, besides `home`'s own adapters/; empty for none. Nothing is told of
    what lies elsewhere, nor whether there is anything. Raises InvalidRequest, and NotFound where there is nothing.
    """
    path = local_path(
        "src",
        src,
        home,
        (home / "adapters", allowed),
        "adapters",
        "the model's adapters/ and option.allowed_adapter_path",
    )
    try:
        if not path.is_dir():
            raise NotFound("src: there is no such directory", param="src")
        held = {entry.name for entry in path.iterdir() if entry.is_file()}
    except (OSError, ValueError) as error:
        if (what := shortage(error)) is not None:
            raise short_of(what) from error
        raise InvalidRequest("src: the directory cannot be read", param="src") from None
    if _CONFIG not in held or held.isdisjoint(_WEIGHTS):
        raise InvalidRequest(
            f"src: a LoRA adapter is a directory with {_CONFIG} and {_WEIGHTS[0]}", param="src"
        )
    _warn_of_code(path, path.name)
    return path


def _warn_of_code(path: Path, shown: str) -> None:
    if (path / "model.py").is_file():
        logger.warning("%s/model.py is not used: handlers and formatters are the model's alone", shown)
