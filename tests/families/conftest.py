from __future__ import annotations

import pytest

from engine import packed_linear


@pytest.fixture(scope="session", autouse=True)
def _small_layers_are_packed() -> None:
    """The layers of these models are far smaller than those of real ones, and are to take the same way."""
    packed_linear.SMALLEST = 1
