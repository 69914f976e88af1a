"""Why one picture cannot be used, before it is known which of a request's pictures it is."""

from __future__ import annotations

from handlers.errors import ImageError, ImageTooLarge


class PictureProblem(Exception):
    """`reason` is for the client and finishes "image 3: ..."; `error` is what it becomes.

    It never holds the URL, an address or what a library said: those stay in `__cause__`.
    """

    def __init__(self, reason: str, error: type[ImageError] = ImageError) -> None:
        super().__init__(reason)
        self.reason = reason
        self.error = error


def too_many_pixels(max_pixels: int) -> PictureProblem:
    return PictureProblem(f"it has more than {max_pixels} pixels (option.max_image_pixels)", ImageTooLarge)
