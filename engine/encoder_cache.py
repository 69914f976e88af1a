"""The outputs of the image encoder that are kept for requests that show the same images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Any, Protocol


class EncoderOutput(Protocol):
    """A tensor [rows, hidden], or any other object that a family's own `forward` accepts."""

    @property
    def nbytes(self) -> int: ...

    def clone(self) -> Any: ...


class EncoderCache:
    """An LRU cache of encoder outputs with a budget in bytes.

    It may exceed the budget during a step, whose images must all be present; `trim` runs after the step.
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

    def count(self, digest: bytes) -> None:
        """Count the first lookup of a request's image."""
        self.queries += 1
        self.hits += digest in self

    def put(self, digest: bytes, features: EncoderOutput) -> None:
        assert digest not in self._features
        self._features[digest] = features
        self._used += features.nbytes

    def trim(self, keep: Collection[bytes] = ()) -> None:
        """Drop the oldest outputs until the cache is within its budget, except the digests in `keep`."""
        for digest in list(self._features):
            if self._used <= self._budget:
                return
            if digest not in keep:
                self._used -= self._features.pop(digest).nbytes
