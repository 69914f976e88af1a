"""What the modules of all formats count with."""

from __future__ import annotations

from collections.abc import Iterator

from handlers.images.problem import PictureProblem, too_many_pixels

MAX_PARTS = 2**16
"""Chunks, blocks, boxes or directory entries of one file that are looked at. Each costs half a microsecond."""

Pieces = list[bytes | bytearray | memoryview]


def counted(kind: str, most: int = MAX_PARTS) -> Iterator[None]:
    for _ in range(most):
        yield
    raise PictureProblem(f"its {kind} data has more than {most} parts")


def check_count(kind: str, what: str, count: int, most: int) -> None:
    if count > most:
        raise PictureProblem(f"its {kind} data has {count} {what}; at most {most} are accepted")


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise too_many_pixels(max_pixels)
