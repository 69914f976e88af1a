"""Encoded bytes to upright RGB pictures, with Pillow, under a cap on pixels.

Files are decoded in processes of their own (`handlers.images.decoders`), which import this module: it must stay small.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import AvifImagePlugin, Image, TiffImagePlugin, WebPImagePlugin, features

from handlers.errors import ImageTooLarge
from handlers.images.metadata import kind_of, without_metadata
from handlers.images.problem import PictureProblem, too_many_pixels

# The plugins above are imported so that Pillow finds them without importing all of its others.
PLUGINS = (AvifImagePlugin, TiffImagePlugin, WebPImagePlugin)
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if features.check("avif") else [])]

Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)

_HIGH_BYTE = bytes(sample >> 8 for sample in range(2**16))

_DECODED_IN_PLACE = ("JPEG", "PNG", "WEBP", "BMP", "AVIF")
"""Of these, Pillow makes an image only where there is none yet, and of the file's own size."""

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
    """The first frame, turned as its EXIF orientation says, RGB; what is transparent shows the background.

    16-bit samples lose their low byte; colour profiles are ignored. The result shares nothing with a file or
    with another picture, so that threads may read it. Raises PictureProblem; nothing is decoded above
    `max_pixels`.
    """
    with opened(data, max_pixels) as image:
        return flattened(image, background)


def flattened(image: Image.Image, background: Color, canvas: Image.Image | None = None) -> Image.Image:
    """What `decode` makes of a file that is open. To be called within `opened`.

    canvas: zeros in RGB, of the file's size. Where pixels need no conversion, they are decoded right into it, and the
    result is on it.
    """
    if canvas is not None and image.mode == "RGB" and image.format in _DECODED_IN_PLACE:
        image.im = canvas.im
    image.load()
    image = _turn(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return _bare(image)
    return _flatten(image, background)


def convert(image: Image.Image, max_pixels: int, background: Color = WHITE) -> Image.Image:
    """The same for a picture that is open already, of which nothing is changed but that its pixels get read.

    Raises PictureProblem.
    """
    if image.width * image.height > max_pixels:
        raise too_many_pixels(max_pixels)
    if not image.width * image.height:
        raise PictureProblem("it has no pixels")
    try:
        _load(image)
        return _flatten(_turn(image), background)
    except MemoryError as error:
        raise PictureProblem("it needs more memory than there is", ImageTooLarge) from error
    except Exception as error:
        raise PictureProblem("its data is truncated or damaged, or its file was closed") from error


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception:
        if getattr(image, "tile", True):  # Pillow empties it when the pixels are there; then metadata follows
            raise


def measure(data: bytes, max_pixels: int) -> int:
    """Bytes that the decoded picture will take, as its header says. Raises PictureProblem."""
    with opened(data, max_pixels) as image:
        return decoded_bytes(image)


@contextmanager
def opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The picture with its header read; what fails within becomes a PictureProblem."""
    part = "header"
    try:
        data = without_metadata(data, max_pixels)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            part = "pixel data"
            if image.width * image.height > max_pixels:
                raise too_many_pixels(max_pixels)
            yield image
    except PictureProblem:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise too_many_pixels(max_pixels) from error
    except MemoryError as error:
        raise _too_much_memory() from error
    except Exception as error:  # Pillow's readers fail in a dozen ways, all of them about the file.
        if "out of memory" in str(error):
            raise _too_much_memory() from error
        raise PictureProblem(_damaged(data, part, error)) from error


def prepare_pillow(max_pixels: int) -> None:
    """Pillow's settings for the whole process: its own cap lifted to ours, which is checked per picture, and
    its warnings silenced, with which anyone's damaged picture could fill the operator's log.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)


def decoded_bytes(image: Image.Image) -> int:
    """Bytes that Pillow holds for an RGB picture: it pads each pixel to four."""
    return image.width * image.height * 4


def _turn(image: Image.Image) -> Image.Image:
    try:
        method = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Damaged metadata, of which there are many kinds, must not cost the picture.
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
    flat = image.convert("RGB")  # always a new picture
    flat.info.clear()  # profiles and comments, which nobody reads and which the cache does not count
    return flat


def _bare(image: Image.Image) -> Image.Image:
    """The same pixels, not copied, without the file, its profiles and comments, which the cache does not count."""
    return Image.Image()._new(image.im)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Modes I and I;16 hold 16-bit grey, which Pillow's own conversion would clip instead of scale."""
    flat = (image if image.mode == "I" else image.convert("I")).point(_HIGH_BYTE, "L")
    flat.info.clear()  # what is transparent is given as a sample of 16 bits
    return flat


def _damaged(data: bytes, part: str, error: Exception) -> str:
    """part: that Pillow failed on."""
    kind = kind_of(data)
    if kind is None:
        if data[:256].lstrip().lower().startswith((b"<!doctype html", b"<html")):
            return "it is a web page, not a picture"
        if b"<svg" in data[:1024]:
            return "SVG pictures are not supported; send PNG, JPEG or WebP"
        return f"its data is in no supported format ({', '.join(FORMATS)})"
    if part != "header" and "truncated" in str(error):
        return f"its {kind} data is truncated: the image is not complete"
    return f"its {kind} {part} is truncated or damaged"


def _too_much_memory() -> PictureProblem:
    return PictureProblem("decoding it takes more memory than an image of its size may take", ImageTooLarge)
