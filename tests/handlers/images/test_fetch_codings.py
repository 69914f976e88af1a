"""Bodies that their host sent compressed, whole, damaged and hostile."""

from __future__ import annotations

import gzip
import os
import tracemalloc
import zlib
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.errors import ImageFetchFailed, ImageTooLarge
from handlers.images import ImageProblem
from handlers.images.codings import codings_of, without_codings

LIMIT = 100_000

gzipped = partial(gzip.compress, mtime=0)
"""Without the time, which would give each run's tests other names."""


def deflated(data: bytes, window: int, level: int = 6) -> bytes:
    stream = zlib.compressobj(level, wbits=window)
    return stream.compress(data) + stream.flush()


NOT_ENCODED = "but its data is not encoded in this way, or is damaged"


def refusal(data: bytes, *codings: str, limit: int = LIMIT) -> ImageProblem:
    with pytest.raises(ImageProblem) as caught:
        without_codings(data, codings, limit)
    return caught.value


@pytest.mark.parametrize(
    ("header", "codings"),
    [
        (b"", ()),
        (b"identity", ()),
        (b"gzip", ("gzip",)),
        (b" X-GZip , Deflate,", ("gzip", "deflate")),
        (b"identity, gzip", ("gzip",)),
    ],
)
def test_what_the_header_names(header: bytes, codings: tuple[str, ...]) -> None:
    assert codings_of(header) == codings


@settings(max_examples=100, deadline=None)
@given(st.integers(0, LIMIT), st.integers(0, 9), st.booleans(), st.randoms(use_true_random=False))
def test_gzip_and_both_kinds_of_deflate_up_to_the_cap(size: int, level: int, flat: bool, random: object) -> None:
    data = (b"ab" * size)[:size] if flat else random.randbytes(size)  # type: ignore[attr-defined]
    for coding, body in {"gzip": gzip.compress(data, level), "deflate": zlib.compress(data, level)}.items():
        assert without_codings(body, (coding,), size) == data
        if size:
            assert refusal(body, coding, limit=size - 1).error is ImageTooLarge
    body = gzip.compress(deflated(data, -15, level))
    assert without_codings(body, ("deflate", "gzip"), 2 * LIMIT) == data


def test_deflate_without_a_header() -> None:
    for level in range(10):
        assert without_codings(deflated(b"x" * 5000, -15, level), ("deflate",), LIMIT) == b"x" * 5000


def test_a_gzip_file_of_several_members_and_padding() -> None:
    parts = [os.urandom(50_000), b"y" * 20_000, b"", b"z"]
    body = b"".join(map(gzip.compress, parts)) + b"\0" * 512
    assert without_codings(body, ("gzip",), LIMIT) == b"".join(parts)
    assert "many small members" in refusal(gzip.compress(b"") * 1000, "gzip").reason


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_bomb_is_refused_having_allocated_no_more_than_the_cap(coding: str) -> None:
    body = b"\0" * 300_000_000
    body = gzip.compress(body) if coding == "gzip" else zlib.compress(body)
    limit = 2_000_000
    tracemalloc.start()
    try:
        problem = refusal(body, coding, limit=limit)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert problem.error is ImageTooLarge
    assert problem.reason == ("it has more than 2000000 bytes when decompressed (option.max_image_bytes)")
    assert most < limit * 1.5


def test_a_bomb_within_a_bomb() -> None:
    body = gzip.compress(gzip.compress(b"\0" * 50_000_000))
    assert refusal(body, "gzip", "gzip").error is ImageTooLarge


@pytest.mark.parametrize(
    ("data", "codings", "reason"),
    [
        (b"not gzip", ("gzip",), f"gzip, {NOT_ENCODED}"),
        (gzipped(b"x" * 99)[:-9], ("gzip",), "gzip, but its data ends too early"),
        (gzipped(b"x" * 99)[:-6] + b"\0" * 6, ("gzip",), f"gzip, {NOT_ENCODED}"),
        (b"\x78\x9c", ("deflate",), "deflate, but its data ends too early"),
        (b"\xff\xff\xff", ("deflate",), f"deflate, {NOT_ENCODED}"),
        (b"\x1b\x03", ("br",), "br, which is not decoded here: gzip and deflate are"),
        (b"(\xb5/\xfd", ("zstd",), "zstd, which is not decoded here: gzip and deflate are"),
        (b"?", ("gzip", "zstd"), "zstd, which is not decoded here: gzip and deflate are"),
        (b"?", ("<b>\x00",), "of an unknown name, which is not decoded here: gzip and deflate are"),
        (b"?", ("gzip",) * 5, "gzip, and 4 more on top of it, which is refused"),
    ],
)  # fmt: skip
def test_what_cannot_be_decoded_says_why(data: bytes, codings: tuple[str, ...], reason: str) -> None:
    problem = refusal(data, *codings)
    assert problem.reason == f"its host sent it with the Content-Encoding {reason}"
    assert problem.error is ImageFetchFailed


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "base64", "aws-chunked", "utf-8"])
@pytest.mark.parametrize(
    "data",
    [
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"GIF89a",
        b"RIFF\0\1\0\0WEBPVP8 ",
        b"\0\0\0\x1cftypavif",
        b"\0\0\0\x1cftypmif1\0\0\0\0mif1miafavif",
        b"BM\1\2\3\4\5\6\7\x08\x36\0\0\0\x28\0\0\0",
        b"MM*\0",
        b"II\0*",
    ],
)
def test_a_header_that_was_stored_with_plain_bytes_is_not_believed(coding: str, data: bytes) -> None:
    assert without_codings(data, (coding,), LIMIT) == data


IMAGE = b"\x89PNG\r\n\x1a\n and what follows"


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"gzip,aws-chunked", gzipped(IMAGE)),
        (b"aws-chunked, gzip, utf-8", gzipped(IMAGE)),
        (b"deflate, aws-chunked", zlib.compress(IMAGE)),
        (b"br", gzipped(IMAGE)),
        (b"deflate", gzipped(IMAGE)),
        (b"gzip", zlib.compress(IMAGE)),
        (b"", gzipped(IMAGE)),
        (b"gzip", gzipped(gzipped(IMAGE))),
        (b"gzip, deflate", zlib.compress(gzipped(IMAGE))),
        (b"deflate, gzip", zlib.compress(gzipped(IMAGE))),
    ],
)
def test_the_bytes_decide_how_they_are_decoded(header: bytes, data: bytes) -> None:
    assert without_codings(data, codings_of(header), len(IMAGE) + 100) == IMAGE


def test_what_no_header_says_is_decoded_within_the_same_limits() -> None:
    bomb = gzip.compress(b"\0" * 1_000_000)
    assert refusal(bomb).error is ImageTooLarge
    assert refusal(gzip.compress(bomb), "br").error is ImageTooLarge
    assert refusal(gzip.compress(b"x" * 99)[:-9]).reason == ("it begins like a gzip file, but its data ends too early")
    heic = b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic"
    assert "not encoded in this way" in refusal(heic, "gzip").reason
    assert without_codings(heic, (), LIMIT) == heic
