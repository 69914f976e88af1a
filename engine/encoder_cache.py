"""Vision-encoder outputs by digest: a picture is encoded once, however many requests show it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Any, Protocol


class EncoderOutput(Protocol):
    """A tensor, [rows, hidden], or what a family's own forward wants."""

    @property
    def nbytes(self) -> int: ...

    def clone(self) -> Any: ...


class EncoderCache:
    """An LRU of encoder outputs under a memory budget in bytes.

    What the current step needs is never evicted by it: `trim` runs after the step, and keeps the newest.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._used = 0
        self._features: OrderedDict[bytes, Any] = OrderedDict()
        self.queries = 0
        self.hits = 0

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._features

    def __getitem__(self, digest: bytes) -> Any:
        self._features.move_to_end(digest)
        return self._features[digest]

    @property
    def used_bytes(self) -> int:
        return self._used

    def count(self, *, hit: bool) -> None:
        """Note that a request's picture was looked up for the first time."""
        self.queries += 1
        self.hits += hit

    def put(self, digest: bytes, features: EncoderOutput) -> None:
        assert digest not in self._features
        self._features[digest] = features
        self._used += features.nbytes

    def trim(self, keep: Collection[bytes] = ()) -> None:
        """keep: digests that stay in any case."""
        for digest in list(self._features):
            if self._used <= self._budget:
                return
            if digest not in keep:
                self._used -= self._features.pop(digest).nbytes
