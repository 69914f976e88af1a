"""LoRA adapters: which directories are adapters, and what a backend offers that adds and removes them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from handlers.artefacts import local_path
from handlers.errors import InvalidConfiguration, InvalidRequest, NotFound, short_of
from processes.shortage import shortage
from properties.secure_mode import OPEN, SecureMode

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[\w][\w.-]{0,127}", re.ASCII)
_NAME_RULE = "allowed in an adapter's name: letters, digits, `_`, `.` and `-`"
_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """One adapter that requests may name.

    Attributes:
        name: The name that requests use.
        src: The adapter's directory as it was given when the adapter was added.
        pin: Whether it was asked to stay on the device; the engine does so as long as it can.
    """

    name: str
    src: str
    pin: bool = False


class AdapterStore(Protocol):
    """The adapters that requests may name. Each change returns, or raises, when the engine has answered.

    Requests that began with an adapter end with it, even if it is replaced or removed meanwhile. A change continues
    when its caller is cancelled. All methods raise Unavailable while there is no engine.
    """

    def infos(self) -> Sequence[AdapterInfo]:
        """Return the adapters in the order in which they were added."""

    async def add(self, name: str, src: str, *, pin: bool = False) -> None:
        """Load an adapter.

        Args:
            name: The name that requests will use.
            src: A directory on this machine.
            pin: Whether it should stay on the device.

        Raises:
            Conflict: The name is taken.
            InsufficientStorage: There is no space for another adapter.
            NotFound: There is no such directory.
            InvalidRequest: The name or directory is not allowed, or the engine cannot load the files.
        """

    async def update(self, name: str, src: str | None = None, *, pin: bool | None = None) -> None:
        """Reload the adapter, from `src` if given. Requests use the new one as soon as this returns.

        Raises:
            NotFound: There is no adapter of this name.
            ServingError: As `add` does. The old adapter stays in this case.
        """

    async def remove(self, name: str) -> None:
        """Remove an adapter; returns once the last request with it has ended and the engine has dropped it.

        Raises:
            NotFound: There is no adapter of this name.
        """


@dataclass(frozen=True)
class AdapterFiles:
    """The directories that may be loaded as adapters.

    Attributes:
        home: The directory that holds the model's own adapters/, and where relative paths begin.
        allowed: A further directory of adapters; empty for none.
        secure: What SageMaker's secure mode forbids.
    """

    home: Path
    allowed: str = ""
    secure: SecureMode = OPEN

    def at_start(self) -> dict[str, Path]:
        """Return the directory of each adapter in `adapters/` by its name. Raises InvalidConfiguration."""
        found: dict[str, Path] = {}
        place = self.home / "adapters"
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

    def named(self, info: AdapterInfo) -> Path:
        """Return the directory that a client names as `src`: a path or a `file:` URL.

        Nothing is said about what lies outside the allowed directories, not even whether it exists.

        Raises:
            InvalidRequest: It is not an adapter, not in an allowed directory, or not allowed in secure mode.
            NotFound: It does not exist.
        """
        roots = (self.home / "adapters", self.allowed)
        named = "the model's adapters/ and option.allowed_adapter_path"
        path = local_path("src", info.src, self.home, roots, "adapters", named)
        try:
            if not path.is_dir():
                raise NotFound("src: there is no such directory", param="src")
            files = {entry.name for entry in path.iterdir() if entry.is_file()}
        except (OSError, ValueError) as error:
            if (what := shortage(error)) is not None:
                raise short_of(what) from error
            raise InvalidRequest("src: the directory cannot be read", param="src") from None
        if _CONFIG not in files or files.isdisjoint(_WEIGHTS):
            raise InvalidRequest(f"src: a LoRA adapter is a directory with {_CONFIG} and {_WEIGHTS[0]}", param="src")
        _warn_of_code(path, path.name)
        if forbidden := list(self.secure.files(path)):
            for problem in forbidden:
                logger.warning("adapter %s: %s", info.name, problem)
            raise InvalidRequest("src: the adapter has a file that SageMaker's secure mode forbids", param="src")
        return path


def check_adapter_name(name: str) -> None:
    """Raise InvalidRequest for a name that an adapter may not have."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"name {name[:80]!r}: {_NAME_RULE}, 128 characters at most", param="name")


def _warn_of_code(path: Path, shown: str) -> None:
    if (path / "model.py").is_file():
        logger.warning("%s/model.py is not used: handlers and formatters are the model's alone", shown)
