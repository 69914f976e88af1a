"""The tests of SageMaker's own clients, asked of a container that was started as SageMaker starts it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping

import pytest

from tests.examples.test_notebooks import test_an_endpoint_is_made_asked_and_deleted  # noqa: F401
from tests.image.images import podman, run_options
from tests.image.running import Container
from tests.live.test_batch_transform import *  # noqa: F403 - its tests are this file's
from tests.live.test_sagemaker_clients import *  # noqa: F403 - and so are its
from tests.live.test_sagemaker_snippets import *  # noqa: F403
from tests.support.sagemaker_platform import Platform
from tests.support.shapes import SHAPES

# They need a server whose answers are scripted, which the image has not.
del test_what_happens_to_a_stream_after_its_first_token  # noqa: F821
del test_a_failure_of_the_server_is_not_written_into_the_output  # noqa: F821
del test_lines_wait_for_places_that_others_have, test_a_client_that_leaves_ends_all_its_lines  # noqa: F821


@pytest.fixture(scope="module")
def shapes_server(shapes_container: Container) -> Container:
    return shapes_container


@pytest.fixture(scope="module")
def server(shapes_container: Container) -> Container:
    return shapes_container


@pytest.fixture
def platform(image: str) -> Iterator[Platform]:
    def start(environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
        given = [part for item in environ.items() for part in ("--env", "=".join(item))]
        options = run_options(("--volume", f"{SHAPES}:{SHAPES}:ro", *given))
        return subprocess.Popen(podman("run", "--rm", *options, image, "serve"), stdout=subprocess.DEVNULL)

    with Platform(start) as running:
        yield running
