"""One thread per test process: tiny models lose more to a thread pool than they win, above all on a busy machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.live import LiveServer
from tests.support.shapes import SHAPES

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


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
