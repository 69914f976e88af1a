"""How much of a model's weights an engine has read, seen from outside.

vLLM reports nothing while it loads, and transformers counts tensors, whose bytes may be read later. Both map the files
of the weights, and the kernel says which pages of a mapping have been read.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Set
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
import psutil

from engine.errors import ModelLoadError
from engine.weights import weight_files
from handlers import progress
from handlers.backends.weight_files import safetensors_files

WARM_UP = "warming up"
"""The phase after the weights."""

LOOK_SECONDS = 0.5

_ENTRIES = 2**17
"""Pages whose state is read from the kernel at once: 1 MiB of it."""


@asynccontextmanager
async def weights_told(
    folder: Path, roots: Callable[[], Iterable[int]], look_seconds: float = LOOK_SECONDS
) -> AsyncIterator[None]:
    """Report to the progress of the current load how far an engine is, while the context is open.

    Args:
        folder: Directory of the model.
        roots: Returns the ids of the engine's processes; their descendants are looked at, too.
        look_seconds: The shortest pause between two looks.
    """
    telling = asyncio.create_task(_tell(folder, roots, progress.current(), look_seconds))
    try:
        yield
    finally:
        telling.cancel()


async def _tell(
    folder: Path, roots: Callable[[], Iterable[int]], loading: progress.Progress, look_seconds: float
) -> None:
    weights = await asyncio.to_thread(WeightsRead, folder)
    looks_without, pause = 0, look_seconds
    while True:
        await asyncio.sleep(pause)
        began = time.monotonic()
        mapped = await asyncio.to_thread(weights.look, roots())
        pause = max(look_seconds, 4 * (time.monotonic() - began))  # some 25 ms a GiB
        if mapped:
            loading.begin("weights", weights.total, ago=pause)
            loading.done, looks_without = weights.done, 0
        elif weights.done:
            looks_without += 1
            if looks_without == 2:  # at one look the engine may be between two files
                loading.begin(WARM_UP)


class WeightsRead:
    """The bytes of a model's weights that have been read.

    A reader that maps no file (vLLM's `eager` strategy, its readers of pickles and of streams) is not seen.

    Attributes:
        done: Bytes that had been read at the last look.
        total: Bytes of all the files; 0 if they cannot be found.
    """

    def __init__(self, folder: Path) -> None:
        """Find the files. Blocks."""
        try:
            files = safetensors_files(folder) or weight_files(folder, pickled=True)
            self._sizes = {os.path.realpath(file): file.stat().st_size for file in files}
        except (ModelLoadError, OSError, ValueError):
            self._sizes = {}  # the engine will say what is wrong
        self._read: dict[str, int] = {}
        self.done = 0
        self.total = sum(self._sizes.values())

    def look(self, roots: Iterable[int]) -> bool:
        """Count what processes have read by now; return whether any of the files is mapped. Blocks."""
        mapped: set[str] = set()
        for root in roots:
            with suppress(OSError, psutil.Error):  # it may have ended
                process = psutil.Process(root)
                for one in (process, *process.children(recursive=True)):
                    for path, count in _present(one.pid, self._sizes.keys()):
                        mapped.add(path)
                        self._read[path] = max(self._read.get(path, 0), count)
        last = max((at for at, path in enumerate(self._sizes) if path in self._read), default=-1)
        done = 0
        for at, (path, size) in enumerate(self._sizes.items()):
            if path in mapped:
                done += min(size, self._read[path])
            elif at <= last:
                done += size  # it, or one after it, was mapped and no longer is
        self.done = max(self.done, done)
        return bool(mapped)


def _present(pid: int, paths: Set[str]) -> Iterator[tuple[str, int]]:
    """Yield the files of `paths` that a process has mapped, and how many bytes of each mapping it has touched.

    `smaps` says the same, but the kernel would walk all pages of a process that may hold a model.
    """
    with (
        Path(f"/proc/{pid}/maps").open(encoding="utf-8", errors="surrogateescape") as maps,
        Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap,
    ):
        for line in maps:
            span, *_, path = line.rstrip("\n").split(maxsplit=5)
            if path not in paths:
                continue
            begin, end = (int(address, 16) // mmap.PAGESIZE for address in span.split("-"))
            pages = 0
            for first in range(begin, end, _ENTRIES):
                pagemap.seek(8 * first)
                entries = np.frombuffer(pagemap.read(8 * min(_ENTRIES, end - first)), np.int64)
                pages += int(np.count_nonzero(entries < 0))  # the highest bit: the page is present
            yield path, pages * mmap.PAGESIZE
