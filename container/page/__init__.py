"""The page for people: its files, and what it shows of the model. The scripts in this folder do the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from container.check import effective_options
from handlers.backends.base import Lifecycle
from handlers.backends.select import Choice
from handlers.errors import NotFound
from handlers.request import Reply
from handlers.version import VERSION
from properties.configuration import Configuration
from properties.field import Level

_HERE = Path(__file__).parent
_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
_FILES = frozenset(path.name for path in _HERE.iterdir() if path.suffix in _TYPES)

_INSTALLED = Path(sys.prefix) / "share/doc/lmi-handler"
_DOCS = {
    path.name: path for path in sorted((_INSTALLED if _INSTALLED.is_dir() else _HERE.parents[1] / "docs").glob("*.md"))
}
"""The documentation, where pip installs it or in a checkout."""

_EXAMPLES = "examples.json"
"""Beside a model: a list of {"question", "image"}, the image a file's name below the model's directory."""
_MOST_EXAMPLES = 12
_IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}

_HEADERS = {
    # Nothing from elsewhere, no script or style in the markup; data: for images that the user has chosen.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def is_on(configuration: Configuration) -> bool:
    """Whether the page is served: as `option.page` says, but on a server with a key only if that option is set."""
    settings = configuration.settings
    chosen = configuration.sources["page"].level is not Level.DEFAULT
    return settings.page and (chosen or settings.api_key is None)


def file(name: str) -> Reply:
    """Return a file of the page, or of the documentation (`docs/NAME.md`). Raises NotFound."""
    if (document := _DOCS.get(name.removeprefix("docs/"))) is not None and name.startswith("docs/"):
        return Reply(200, "text/plain; charset=utf-8", document.read_bytes(), headers=dict(_HEADERS))
    if name not in _FILES:
        raise NotFound("the page has no such file")
    path = _HERE / name
    return Reply(200, _TYPES[path.suffix], path.read_bytes(), headers=dict(_HEADERS))


class ModelPage:
    """What the page shows of the model that is served."""

    def __init__(self, configuration: Configuration, directory: Path, choice: Choice) -> None:
        """Create the description.

        Args:
            configuration: The options, with those in the model's own files.
            directory: The model's directory.
            choice: The backend and why it serves.
        """
        self._configuration = configuration
        self._choice = choice
        self._examples = _examples(directory)

    def describe(self, backend: Lifecycle) -> Reply:
        """Return the reply to `GET /engine/model`. backend: loaded already."""
        settings, can = self._configuration.settings, backend.capabilities
        choice = self._choice
        body = {
            "name": self._configuration.public_names[0],
            "names": list(self._configuration.accepted_names),
            "backend": choice.backend,
            "reason": choice.reason,
            "dtype": can.dtype,
            "devices": can.compute_type,
            "replicas": backend.stats().replicas,
            "context": can.max_model_len,
            "cache_tokens": can.cache_tokens,
            "images": can.images,
            "structured_outputs": can.structured_outputs,
            "limits": {
                "images_per_prompt": settings.limit_mm_per_prompt.get("image", 1),
                "image_bytes": settings.max_image_bytes,
                "image_pixels": settings.max_image_pixels,
                "request_bytes": settings.max_request_size,
                "requests": settings.max_rolling_batch_size,
            },
            "options": self.options(),
            "examples": [
                {"question": question, "image": f"page/examples/{number}"}
                for number, (question, _) in enumerate(self._examples)
            ],
            "documentation": list(_DOCS),
            "key": settings.api_key is not None,
            "version": VERSION,
        }
        return Reply(200, "application/json", json.dumps(body).encode() + b"\n")

    def options(self) -> list[dict[str, str]]:
        """Return the options that were set: secrets are masked, and of a model's path only its last part is shown."""
        return [
            {"name": name, "value": _shown(name, row["value"]), "source": row["source"]}
            for name, row in effective_options(self._configuration).items()
            if row["given"]
        ]

    def example(self, number: str) -> Reply:
        """Return an example's image. Raises NotFound."""
        path = {str(known): path for known, (_, path) in enumerate(self._examples)}.get(number)
        if path is None:
            raise NotFound("the model has no such example")
        return Reply(200, _IMAGES[path.suffix], path.read_bytes(), headers=dict(_HEADERS))


def _shown(name: str, value: Any) -> str:
    if name == "option.model_id" and Path(value).is_absolute():
        return Path(value).name  # a client need not know where on the machine it is
    return value if isinstance(value, str) else json.dumps(value)


def _examples(directory: Path) -> list[tuple[str, Path]]:
    """Return the questions and images that the model's directory proposes, without those that cannot be read."""
    try:
        listed: Any = json.loads((directory / _EXAMPLES).read_text())
    except (OSError, ValueError, RecursionError):
        return []
    found = []
    for item in listed[:_MOST_EXAMPLES] if isinstance(listed, list) else []:
        if isinstance(item, Mapping) and isinstance(item.get("question"), str) and isinstance(item.get("image"), str):
            with suppress(OSError, ValueError):  # of names that no file can have
                path = (directory / item["image"]).resolve()
                if path.is_relative_to(directory.resolve()) and path.suffix in _IMAGES and path.is_file():
                    found.append((item["question"], path))
    return found
