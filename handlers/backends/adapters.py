"""What a backend offers for LoRA adapters that come and go while it serves."""

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

    Requests that began with an adapter end with it, also where it is replaced or removed meanwhile. A change goes on
    when its caller is cancelled. All raise Unavailable while there is no engine to ask.
    """

    def infos(self) -> Sequence[AdapterInfo]:
        """In the order of their coming."""

    async def add(self, name: str, src: str, *, pin: bool = False) -> None:
        """src: a directory on this machine.

        Raises Conflict (the name is taken), InsufficientStorage (no place is free), NotFound (no such directory) and
        InvalidRequest (a name or directory that is not allowed, or files that the engine cannot load).
        """

    async def update(self, name: str, src: str | None = None, *, pin: bool | None = None) -> None:
        """Reload the adapter, from `src` if given. Requests use the new one as soon as this returns.

        Raises:
            NotFound: There is no adapter of this name.
            ServingError: As `add` does. The old adapter stays in this case.
        """

    async def remove(self, name: str) -> None:
        """Returns once the last request with it has ended and the engine has let go of it. Raises NotFound."""
