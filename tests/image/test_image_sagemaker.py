"""The tests of SageMaker's own clients, asked of a container that was started as SageMaker starts it."""

from __future__ import annotations

import pytest

from tests.image.running import Container
from tests.live.test_sagemaker_clients import *  # noqa: F403 - its tests are this file's

# It kills a server whose answers are scripted, which the image has not.
del test_what_happens_to_a_stream_after_its_first_token  # noqa: F821


@pytest.fixture(scope="module")
def server(shapes_container: Container) -> Container:
    return shapes_container
