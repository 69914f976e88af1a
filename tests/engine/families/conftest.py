from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine import packed_linear


@pytest.fixture(scope="module", autouse=True)
def _small_layers_are_packed() -> Iterator[None]:
    """The layers of these models are far smaller than those of real ones, and are to take the same way."""
    before, packed_linear.SMALLEST = packed_linear.SMALLEST, 1
    yield
    packed_linear.SMALLEST = before
