"""One thread per test process: tiny models lose more to a thread pool than they win, above all on a busy machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.support.backend import VLLM
from tests.support.live import LiveServer
from tests.support.shapes import SHAPES

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not VLLM:  # one engine process, with the only caches
    os.environ.setdefault("SERVING_MAX_WORKERS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# The same examples in each run, and no time limit for one: a busy machine is no reason to fail.
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share the files among the processes of pytest-xdist: a file's tests share its models and servers.

    Live tests share servers, too, and attacks are measured one at a time.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            together = (folder for folder in ("tests/attack/", "tests/live/") if file.startswith(folder))
            return next(together, file)

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def shapes_server() -> Iterator[LiveServer]:
    """The model in the repository behind one server for all suites that need no options of their own."""
    shapes = SHAPES
    with LiveServer(shapes, 'limit_mm_per_prompt={"image": 4}') as live:
        yield live


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Imports torch, which reads the variables above when it is imported.
    from tests.support.models import make_llava

    return make_llava(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_server(tiny_llava: Path) -> Iterator[LiveServer]:
    """A random Llava in float32, whose answers are held to those of transformers."""
    options = ("dtype=float32", 'limit_mm_per_prompt={"image": 4}', "trust_request_chat_template=true")
    with LiveServer(tiny_llava, *options) as live:
        yield live
