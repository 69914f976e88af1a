"""The image that the tests of this folder ask, built once; where that cannot be, they are skipped and say why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.images import CannotBuild, build
from tests.image.running import Container
from tests.support.live import free_port
from tests.support.shapes import SHAPES

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.image)


@pytest.fixture(scope="session")
def image() -> str:
    try:
        return build()
    except CannotBuild as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def shapes_container(image: str) -> Iterator[Container]:
    """As SageMaker starts it, on a port of the platform's choice."""
    port = free_port()
    mount = ("--volume", f"{SHAPES}:/opt/ml/model:ro", "--env", f"SAGEMAKER_BIND_TO_PORT={port}")
    with Container(image, "serve", options=(*mount, "--env", 'OPTION_LIMIT_MM_PER_PROMPT={"image": 4}')) as one:
        one.ready()
        yield one
