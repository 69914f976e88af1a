"""What is told of an engine that reads its weights: a process that maps files as slowly as the test lets it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from handlers import progress
from handlers.backends.weights_read import WeightsRead, weights_told
from handlers.progress import Progress

READER = """
import mmap, sys
mapped = {}
for line in sys.stdin:
    name, part = line.split()
    if part == "close":
        mapped.pop(name).close()
    else:
        if name not in mapped:
            with open(name, "rb") as file:
                mapped[name] = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        mapped[name][: int(len(mapped[name]) * float(part))]
    print(flush=True)
"""


class Reader:
    """A process below another one, as an engine's workers are."""

    def __init__(self) -> None:
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {READER!r}])"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def do(self, file: Path, part: str) -> None:
        """Touch a part of a file, mapped if need be, or "close" it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(file, part, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline()


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.process.communicate()


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """A model whose weights are in two files, which links lead to as in the hub's cache."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    places = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({f"w{number}": np.ones(4 << 20, np.uint8)}, tmp_path / "blobs" / name)
        (tmp_path / "model" / name).symlink_to(tmp_path / "blobs" / name)
        places[f"w{number}"] = name
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return [tmp_path / "model" / name for name in places.values()]


def test_the_bytes_that_an_engine_has_read_are_counted(reader: Reader, shards: list[Path]) -> None:
    first, second = shards
    weights, size = WeightsRead(first.parent), first.stat().st_size
    engine = [reader.process.pid]
    assert weights.total == 2 * size
    assert not weights.look(engine)
    reader.do(first, "0.5")
    assert weights.look(engine)
    assert size / 2 <= weights.done <= size  # the kernel also maps pages around those that are read
    reader.do(first, "1")
    assert weights.look(engine)
    assert weights.done == size
    reader.do(first, "close")
    assert not weights.look(engine)
    reader.do(second, "0.25")
    assert weights.look(engine)
    assert 1.25 * size <= weights.done <= 2 * size
    reader.do(second, "close")
    assert not weights.look(engine)
    assert weights.done == weights.total
    assert not weights.look([2**22 + 1])  # no such process


def test_weights_are_told_and_then_the_warm_up(reader: Reader, shards: list[Path]) -> None:
    first, _ = shards

    async def until(loading: Progress, what: str) -> None:
        async with asyncio.timeout(20):
            while not str(loading).startswith(what):  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0)

    async def load() -> None:
        with progress.shown(lambda _: None, 60) as loading:
            async with weights_told(first.parent, lambda: [reader.process.pid], look_seconds=0.001):
                reader.do(first, "1")
                await until(loading, "weights 4.0 MiB of 8.0 MiB, ")
                reader.do(first, "close")
                await until(loading, "warming up, ")

    asyncio.run(load())


def test_a_model_without_weights_has_none_to_be_read(tmp_path: Path) -> None:
    weights = WeightsRead(tmp_path)
    assert not weights.look([1])
    assert (weights.done, weights.total) == (0, 0)
