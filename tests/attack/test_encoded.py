"""Compressed bodies and embeddings: what they cost to undo, whatever they say of themselves."""

from __future__ import annotations

import base64
import gzip
import io
import random
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable

import pytest

from handlers.images import ImageProblem
from handlers.images.codings import without_codings
from handlers.images.embeddings import (
    BadTensorFile,
    EncodedEmbeddings,
    SavedTensor,
    read_embeddings,
    read_tensor,
)
from handlers.request import EmbeddingsPart
from tests.support.pace import too_long

MEGA = 2**20
LIMIT = 20 * MEGA
SLACK = 2 * MEGA


def traced(work: Callable[[], object]) -> tuple[object, int, float]:
    """(what it returned or why it refused, bytes at the peak, seconds of processor time)."""
    tracemalloc.start()
    start = time.process_time()
    try:
        result: object = work()
    except (ImageProblem, BadTensorFile) as refusal:
        result = refusal
    finally:
        seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return result, peak, seconds


def zeros(size: int) -> bytes:
    stream = zlib.compressobj(9, wbits=31)
    return b"".join([*(stream.compress(bytes(MEGA)) for _ in range(size // MEGA)), stream.flush()])


def wrapped(data: bytes, times: int) -> bytes:
    for _ in range(times):
        data = gzip.compress(data, 0)
    return data


EMPTY = gzip.compress(b"")
NOISE = random.Random(1).randbytes(70_000)

BODIES: dict[str, tuple[Callable[[], bytes], int]] = {
    "a gigabyte of zeros": (lambda: zeros(1024 * MEGA), 1),
    "zeros up to the limit": (lambda: zeros(LIMIT), 1),
    "zeros up to the limit in four layers": (lambda: wrapped(zeros(LIMIT), 3), 4),
    "a body at the limit in four layers": (lambda: wrapped(bytes(19 * MEGA), 4), 4),
    "a million empty members": (lambda: EMPTY * 1_000_000, 1),
    "as many members as are accepted": (lambda: gzip.compress(bytes(1000), 0) * 19_000, 1),
    "members that become small": (lambda: gzip.compress(NOISE, 0) * 200 + gzip.compress(b"x") * 19_000, 1),
    "a file name of 19 MB": (lambda: b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * 19 * MEGA, 1),
    "four million empty blocks": (lambda: b"\x1f\x8b\x08\0" + bytes(6) + b"\0\0\0\xff\xff" * 4_000_000, 1),
    "padding of 20 MB": (lambda: gzip.compress(b"x") + bytes(LIMIT), 1),
}


@pytest.mark.parametrize("name", BODIES)
def test_undoing_a_coding_takes_no_more_than_its_result_may(name: str) -> None:
    make, layers = BODIES[name]
    body = make()
    result, peak, seconds = traced(lambda: without_codings(body, ("gzip",) * layers, LIMIT))
    assert isinstance(result, bytes | ImageProblem)
    # One layer, and the one that is made of it.
    assert peak < (2 if layers > 1 else 1.2) * LIMIT + SLACK
    assert not too_long(seconds, 2)


def archive(*entries: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as new:
        for name, content in entries:
            new.writestr(name, content)
    return file.getvalue()


def pickled(instructions: bytes) -> bytes:
    return archive(("a/data.pkl", instructions), ("a/data/0", bytes(4)))


def doubled(times: int) -> bytes:
    """A tuple of a tuple twice, of a tuple twice, and so on."""
    return b"\x80\x02)" + b"".join(bytes([113, i, 104, i, 104, i, 134]) for i in range(times))


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "20,000 entries": lambda: archive(*((f"a/{i}", b"") for i in range(20_000))),
    "a compressed entry": lambda: archive(("a/data.pkl", bytes(300 * MEGA)), method=zipfile.ZIP_DEFLATED),
    "archives within each other": lambda: archive(("a/data.pkl", archive(("a/data.pkl", bytes(MEGA))))),
    "a pickle of 19 MB": lambda: archive(("a/data.pkl", bytes(19 * MEGA))),
    "a pickle of marks": lambda: pickled(b"\x80\x02" + b"(" * 4000 + b"."),
    "a pickle of doubled tuples": lambda: pickled(doubled(200) + b"."),
    "a pickle that calls with doubled tuples": lambda: pickled(b"\x80\x02cx\ny\n" + doubled(200)[2:] + b"R."),
    "a pickle of a lying length": lambda: pickled(b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f."),
    "a pickle of a lying number": lambda: pickled(b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\xff" * 255 + b"."),
    "a directory that is far away": lambda: archive(("a/data.pkl", b"."))[:-6] + b"\xff\xff\xff\x7f\0\0",
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_hostile_archive_is_refused_without_being_unpacked(name: str) -> None:
    file = ARCHIVES[name]()
    result, peak, seconds = traced(lambda: read_tensor(file, ("float32",)))
    assert isinstance(result, BadTensorFile)
    assert peak < SLACK
    assert not too_long(seconds, 1)


@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float16", 2), ("float32", 4), ("float64", 8)])
def test_making_numbers_of_embeddings_takes_what_they_are_charged_for(dtype: str, itemsize: int) -> None:
    values = memoryview(bytes(16 * MEGA))
    tensor = SavedTensor(dtype, (len(values) // itemsize // 1024, 1024), values)
    encoded = EncodedEmbeddings(tensor, None, b"digest")
    _, peak, _ = traced(encoded.decode)
    assert peak < encoded.size + SLACK


def test_embeddings_in_base64_are_refused_by_their_length() -> None:
    part = EmbeddingsPart(rows=base64.b64encode(bytes(3 * MEGA)).decode())
    result, peak, _ = traced(lambda: read_embeddings(part, MEGA))
    assert isinstance(result, ImageProblem)
    assert "more than 1048576 bytes" in result.reason
    assert peak < SLACK
