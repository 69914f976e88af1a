"""What a backend offers for LoRA adapters that are added and removed while it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


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
