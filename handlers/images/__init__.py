"""From the URLs in a request to decoded images: fetch, check, decode, cache."""

from __future__ import annotations

from collections.abc import Iterator

from handlers.errors import ImageError, ImageTooLarge

MAX_PARTS = 2**16
"""Greatest number of chunks, blocks, boxes or directory entries of a file that are read. Each costs half
a microsecond."""

MAX_PARTS_FOR_SIZE = 2**10
"""Greatest number of segments, blocks or entries that are read to find a file's size. Real files need far fewer."""

NO_SVG = "SVG images are not supported; send PNG, JPEG or WebP"
"""The reason why an SVG image cannot be used."""

Pieces = list[bytes | bytearray | memoryview]

Size = tuple[int, ...] | None
"""Width and height, with a third number for a progressive JPEG; None if a quick look does not find them."""


class ImageProblem(Exception):
    """The reason why an image cannot be used, before it is known which of a request's images it is.

    It never contains the URL, an address or a library's message: those stay in `__cause__`.

    Attributes:
        reason: For the client; it completes a message that begins "image 3: ".
        error: Class of the error that is made of it.
    """

    def __init__(self, reason: str, error: type[ImageError] = ImageError) -> None:
        super().__init__(reason)
        self.reason = reason
        self.error = error


def too_many_pixels(max_pixels: int) -> ImageProblem:
    """Describe an image with more pixels than allowed."""
    return ImageProblem(f"it has more than {max_pixels} pixels (option.max_image_pixels)", ImageTooLarge)


def too_many_bytes(max_bytes: int) -> ImageProblem:
    """Describe a file that is larger than allowed."""
    return ImageProblem(f"it has more than {max_bytes} bytes (option.max_image_bytes)", ImageTooLarge)


def counted(kind: str, most: int = MAX_PARTS) -> Iterator[None]:
    """Yield once for each part of a file; raise ImageProblem for more than `most`."""
    for _ in range(most):
        yield
    raise ImageProblem(f"its {kind} data has more than {most} parts")


def check_count(kind: str, what: str, count: int, most: int) -> None:
    """Raise ImageProblem for a count above `most`."""
    if count > most:
        raise ImageProblem(f"its {kind} data has {count} {what}; at most {most} are accepted")


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise ImageProblem for an image with more than `max_pixels`."""
    if width * height > max_pixels:
        raise too_many_pixels(max_pixels)
