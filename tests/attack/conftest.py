"""One server for all attacks of a test session, replaced when one of them has left it unable to answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.attack.target import Target


class Alive:
    """One server for all attacks; one that an attack has left unable to answer is replaced."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._target: Target | None = None

    def target(self) -> Target:
        if self._target is not None:
            try:
                assert not self._target.left_over(10)
            except (AssertionError, httpx.HTTPError):
                self.close()
        if self._target is None:
            self._target = Target(self._folder).__enter__()
        return self._target

    def close(self) -> None:
        target, self._target = self._target, None
        if target is not None:
            target.kill()


@pytest.fixture(scope="session")
def alive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alive]:
    kept = Alive(tmp_path_factory.mktemp("attack"))
    yield kept
    kept.close()


@pytest.fixture
def target(alive: Alive) -> Target:
    return alive.target()
