"""Fetches models from the Hugging Face hub or S3 to a directory on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

from handlers.errors import InvalidRequest

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_FILE_URL = re.compile(r"file:(?://(?:localhost)?(?=/))?", re.IGNORECASE)
_LONGEST = 4096


class ArtefactError(Exception):
    """The model cannot be fetched; the message names it and says what to do."""


class Cancelled(Exception):
    """The download was cancelled."""


def local_path(param: str, text: str, base: Path, roots: Iterable[str | Path], what: str, named: str) -> Path:
    """Return the path that a client gives in a parameter, with links resolved.

    Errors say nothing about other directories, not even whether they exist.

    Args:
        param: The parameter's name.
        text: The path, or a file: URL.
        base: The directory in which a relative path begins.
        roots: The directories below which the path must be; empty texts are ignored.
        what: The name of what is loaded, for messages, such as "adapters".
        named: The name of the roots, for messages.

    Raises:
        InvalidRequest: The text is not a path, or the path is not below a root.
    """
    if len(text) > _LONGEST or "\0" in text or not text.strip():
        raise InvalidRequest(f"{param}: the path of a directory", param=param)
    if match := _FILE_URL.match(text):
        text = unquote(text[match.end() :])
    elif _URL.match(text):
        raise InvalidRequest(
            f"{param}: {what} are loaded from this machine's directories only; copy the files there first",
            param=param,
        )
    try:
        path = Path(os.path.realpath(base / text))
        allowed = [os.path.realpath(root) for root in roots if root]
    except (OSError, ValueError):
        raise InvalidRequest(f"{param}: not a path of a directory", param=param) from None
    if not any(path.is_relative_to(root) and path != Path(root) for root in allowed):
        raise InvalidRequest(f"{param}: not below a directory that {what} may be loaded from ({named})", param=param)
    return path
