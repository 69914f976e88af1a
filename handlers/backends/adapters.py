"""What a backend offers for LoRA adapters that come and go while it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """src: the adapter's directory as whoever added it wrote it. pin: as they asked: it keeps its place on the device
    where the engine can spare one."""

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
        """Load it anew, from `src` if given; requests get the new one as soon as this returns. Raises as `add` does,
        and NotFound for the name; the old one stays then."""

    async def remove(self, name: str) -> None:
        """Returns once the last request with it has ended and the engine has let go of it. Raises NotFound."""
