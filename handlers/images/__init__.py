"""From the URLs in a request to decoded images: fetch, check, decode, cache."""

from __future__ import annotations

from handlers.errors import ImageError, ImageTooLarge


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
