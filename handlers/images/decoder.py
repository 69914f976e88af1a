"""Decodes one file to an upright RGB image with Pillow, limited in pixels.

The server does so in processes (`handlers.images.decoder_process`), which import this file and must stay small.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from PIL import Image, features

from handlers.errors import ImageTooLarge
from handlers.images import NO_SVG, ImageProblem, check_pixels, too_many_pixels
from handlers.images.formats import kind_of, without_metadata

for _plugin in ("Avif", "Bmp", "Gif", "Jpeg", "Png", "Tiff", "WebP"):
    import_module(f"PIL.{_plugin}ImagePlugin")  # now, or Pillow would import all of its plugins for the first image

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if features.check("avif") else [])]

Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)

_HIGH_BYTE = bytes(sample >> 8 for sample in range(2**16))

_DECODED_IN_PLACE = ("JPEG", "PNG", "WEBP", "BMP", "AVIF")
"""For these formats Pillow creates an image only if there is none yet, and in the file's own size."""

ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, max_pixels: int, background: Color = WHITE) -> Image.Image:
    """Decode the first frame to RGB, turned by its EXIF orientation; transparent parts show the background.

    16-bit samples lose their low byte, and colour profiles are ignored. The result shares nothing with a file or with
    another image, so threads may read it.

    Raises:
        ImageProblem: The file cannot be used; nothing is decoded above `max_pixels`.
    """
    with opened(data, max_pixels) as image:
        return flattened(image, background)


def flattened(image: Image.Image, background: Color, canvas: Image.Image | None = None) -> Image.Image:
    """Decode an open file as `decode` does; call it within `opened`.

    Args:
        image: The open file.
        background: Colour that shows where the image is transparent.
        canvas: Zeros in RGB, in the file's size. Pixels that need no conversion are decoded into it, and the result
            uses it.
    """
    if canvas is not None and image.mode == "RGB" and image.format in _DECODED_IN_PLACE:
        image.im = canvas.im
    image.load()
    image = _turn(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return _bare(image)
    return _flatten(image, background)


def convert(image: Image.Image, max_pixels: int, background: Color = WHITE) -> Image.Image:
    """Convert an open image as `decode` does. The image is not changed, except that its pixels are read.

    Raises:
        ImageProblem: The image cannot be used.
    """
    check_pixels(image.width, image.height, max_pixels)
    if not image.width * image.height:
        raise ImageProblem("it has no pixels")
    try:
        _load(image)
        return _flatten(_turn(image), background)
    except MemoryError as error:
        raise ImageProblem("it needs more memory than there is", ImageTooLarge) from error
    except Exception as error:
        raise ImageProblem("its data is truncated or damaged, or its file was closed") from error


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception:
        if getattr(image, "tile", True):  # Pillow empties it when the pixels are there; then metadata follows
            raise


@contextmanager
def opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Open a file and read its header. What fails within the context becomes an ImageProblem."""
    part = "header"
    try:
        data = without_metadata(data, max_pixels)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            part = "pixel data"
            check_pixels(image.width, image.height, max_pixels)
            yield image
    except ImageProblem:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise too_many_pixels(max_pixels) from error
    except MemoryError as error:
        raise _too_much_memory() from error
    except Exception as error:  # Pillow's readers fail in a dozen ways, all of them about the file.
        if "out of memory" in str(error):
            raise _too_much_memory() from error
        raise ImageProblem(_damaged(data, part, error)) from error


def prepare_pillow(max_pixels: int) -> None:
    """Set up Pillow for the whole process.

    Pillow's limit of pixels is raised to ours, which is checked for each image. Its warnings are silenced, because
    anyone could fill the operator's log with damaged images.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)


def decoded_bytes(image: Image.Image) -> int:
    """Return the bytes that Pillow holds for an RGB image: it pads each pixel to four."""
    return image.width * image.height * 4


def _turn(image: Image.Image) -> Image.Image:
    try:
        method = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Damaged metadata, of which there are many kinds, must not cost the image.
        return image
    return image if method is None else image.transpose(method)


def _flatten(image: Image.Image, background: Color) -> Image.Image:
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        flat = Image.new("RGB", image.size, background)
        flat.paste(layer, mask=layer)
        return flat
    flat = image.convert("RGB")  # always a new image
    flat.info.clear()  # profiles and comments, which are not used and which the cache does not count
    return flat


def _bare(image: Image.Image) -> Image.Image:
    """Return the same pixels without the file, profiles and comments, which the cache does not count."""
    return Image.Image()._new(image.im)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale modes I and I;16, which hold 16-bit grey; Pillow's own conversion would clip."""
    flat = (image if image.mode == "I" else image.convert("I")).point(_HIGH_BYTE, "L")
    flat.info.clear()  # the transparent colour is given as a sample of 16 bits
    return flat


def _damaged(data: bytes, part: str, error: Exception) -> str:
    """Describe a damaged file; `part` is the part on which Pillow failed."""
    kind = kind_of(data)
    if kind is None:
        if data[:256].lstrip().lower().startswith((b"<!doctype html", b"<html")):
            return "it is a web page, not an image"
        if b"<svg" in data[:1024]:
            return NO_SVG
        return f"its data is not in a supported format ({', '.join(FORMATS)})" if data else "its file is empty"
    if part != "header" and "truncated" in str(error):
        return f"its {kind} data is truncated: the image is not complete"
    return f"its {kind} {part} is truncated or damaged"


def _too_much_memory() -> ImageProblem:
    return ImageProblem("decoding it takes more memory than an image of its size may take", ImageTooLarge)
