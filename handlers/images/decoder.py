"""Decodes files to upright RGB images with Pillow, limited in pixels; and the process that does so for the server.

A file may be made to decode for minutes, to fill the memory, or to crash a codec. Threads could not be stopped then,
but a process can: `python -m handlers.images.decoder DESCRIPTOR` sets its limits for each image, and the kernel ends it
when the time is up. It must stay small.

It receives `Settings`, with the memory for small images; then for each image a `Question` and the file, with separate
memory for a large image. It sends an empty message when it is ready, and one JSON object for each image (see
`_answer`). The pixels come back in anonymous memory that both processes map. The kernel frees it when the last of them
unmaps it or dies; nothing appears in /dev/shm.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import io
import json
import mmap
import os
import resource
import signal
import struct
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypedDict

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    _imaging,
    features,
)

from handlers.errors import ImageTooLarge
from handlers.images import NO_SVG, ImageProblem, check_pixels, too_many_pixels
from handlers.images.formats import kind_of, without_metadata
from processes.inside import Parent, data_bytes

PLUGINS = (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
"""Imported before the first image comes, so that Pillow does not import all of its others."""

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

    16-bit samples lose their low byte, and colour profiles are ignored. The result shares nothing with a file
    or with another image, so threads may read it.

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
        canvas: Zeros in RGB, of the file's size. Pixels that need no conversion are decoded into it, and the
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
    """Convert an open image in the same way; it is not changed, except that its pixels are read.

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
    """Open a file and read its header; what fails within the context becomes an ImageProblem."""
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

    Its own limit is raised to ours, which is checked for each image. Its warnings are silenced, because
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
    flat.info.clear()  # profiles and comments, which nobody reads and which the cache does not count
    return flat


def _bare(image: Image.Image) -> Image.Image:
    """Return the same pixels, not copied, without the file, profiles and comments, which the cache does not count."""
    return Image.Image()._new(image.im)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Modes I and I;16 hold 16-bit grey, which Pillow's own conversion would clip instead of scale."""
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


REUSED_BYTES = 2**23
"""Size of the memory that each decoder uses for images up to full HD, one after the other.

They are copied from it: that costs a tenth of what new shared pages cost, and a process may have at most
65,530 mappings. Copying a larger image would block the event loop for too long.
"""

_HUGE_PAGE = 2**21
"""From this size on, a copy gets a mapping of its own, in huge pages if the kernel has them, which are
allocated in a tenth of the time."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def new_memory(size: int) -> int:
    """Create memory of that many bytes and return its descriptor. Raises OSError.

    Where anonymous memory can be sealed, its size is final: whoever receives the descriptor can neither grow
    it nor remove what another process has mapped.
    """
    try:
        descriptor = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.EPERM, errno.EACCES):
            raise
        with tempfile.TemporaryFile() as file:  # such memory is not there on this system, or in this sandbox
            file.truncate(size)
            return os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class PixelMemory:
    """One side's mapping of such memory, for one image after the other; it takes over the descriptor."""

    def __init__(self, descriptor: int, length: int) -> None:
        try:
            self._memory = mmap.mmap(descriptor, length)
        finally:
            os.close(descriptor)
        self._canvas: Image.Image | None = None

    def canvas(self, size: tuple[int, int]) -> Image.Image:
        """Return an RGB image of zeros; what is decoded into it need not be copied."""
        fresh = self._canvas is None
        self._canvas = _image_on(self._memory, size)
        if not fresh:  # the previous image is still there, and a decoder may leave pixels out
            self._canvas.im.paste((0, 0, 0, 0), (0, 0, *size))
        return self._canvas

    def write(self, image: Image.Image) -> None:
        if self._canvas is None or image.im is not self._canvas.im:
            _image_on(self._memory, image.size).paste(image)

    def copy(self, size: tuple[int, int]) -> Image.Image:
        """Copy the RGB image. Raises OSError."""
        image = _image_on(self._memory, size)
        length = size[0] * size[1] * 4
        if length < _HUGE_PAGE:
            return image.copy()
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # not on this system, or not in this kernel
            memory.madvise(mmap.MADV_HUGEPAGE)
        copy = _image_on(memory, size)
        copy.paste(image)
        copy.readonly = 1  # Pillow copies it before it changes it
        return copy


def read_pixels(descriptor: int, size: tuple[int, int]) -> Image.Image:
    """Return the RGB image without copying it; the descriptor may be closed then. Raises OSError."""
    length = size[0] * size[1] * 4
    # Python's own mapping would keep a descriptor open. Private, so that it cannot be changed by mistake.
    address = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, descriptor, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    mapped = (ctypes.c_char * length).from_address(address)
    weakref.finalize(mapped, _libc.munmap, address, length).atexit = False
    image = _image_on(mapped, size)
    image.readonly = 1  # Pillow copies it before it changes it
    return image


def _image_on(memory: object, size: tuple[int, int]) -> Image.Image:
    """Make an image of memory.

    Pillow's `frombuffer` does the same for modes that files have; RGB of four bytes is only internal to
    Pillow.
    """
    pixels = _imaging.map_buffer(memory, size, "raw", 0, ("RGB", 0, 1))
    return Image.Image()._new(pixels)


SLACK_BYTES = 48 << 20
"""Memory beyond what an image is charged for: codecs' tables and rows, Pillow's plugins, Python itself."""

_KEPT_BYTES = 32 << 20
"""When the process has grown by that much, it ends after its answer."""

_M_TRIM_THRESHOLD = -1
"""From glibc's malloc.h."""


class Settings(TypedDict):
    """Arguments of `decode` that are the same for all images."""

    max_pixels: int
    background: list[int]


class Question(NamedTuple):
    """Limits for one image.

    Attributes:
        pixel_bytes: Memory for the image's pixels, which came with the question, or is the one for small
            images; 0 to ask for the image's size only.
        working_bytes: Memory that decoding may use in addition.
        seconds: Processor time that decoding may use.
    """

    pixel_bytes: int
    working_bytes: int
    seconds: float


QUESTION = struct.Struct("<QQd")
"""A `Question` in a message; the file follows."""


def main() -> None:
    """Decode images until the parent closes the connection."""
    parent = Parent()
    first = parent.receive_with_descriptor()
    if first is None or first[1] is None:
        return
    reused = PixelMemory(first[1], REUSED_BYTES)
    settings: Settings = json.loads(first[0])
    prepare_pillow(settings["max_pixels"])
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # by default one for each core, each with memory of its own
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is in
    _keep_memory()
    gc.freeze()
    start = data_bytes()
    now, grown = start, 0
    limits = _data_limits()
    parent.send(b"")
    while (message := parent.receive_with_descriptor()) is not None:
        body, descriptor = message
        question = Question._make(QUESTION.unpack_from(body))
        data = body[QUESTION.size :]
        del body, message
        memory = reused if descriptor is None else PixelMemory(descriptor, question.pixel_bytes)
        with _limited(question, limits, now):
            answer = _answer(data, memory, question.pixel_bytes, settings)
        del data, memory
        grown += question.working_bytes
        if grown > _KEPT_BYTES:  # small images do not reach it, so the look-up is rare
            _give_back_memory()
            now, grown = data_bytes(), 0
        answer["last"] = start is not None and now is not None and now > start + _KEPT_BYTES
        parent.send(json.dumps(answer).encode())
        if answer["last"]:
            return


def _data_limits() -> tuple[int, int] | None:
    """Return the current limits; None where the system or a sandbox does not allow changing them."""
    try:
        limits = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    except (OSError, ValueError):
        return None
    return limits


@contextmanager
def _limited(question: Question, limits: tuple[int, int] | None, now: int | None) -> Iterator[None]:
    """limits: of data, outside of images. now: what counts against them before the image, or a little less."""
    try:
        if limits is not None and now is not None:
            most, hard = now + question.working_bytes + SLACK_BYTES, limits[1]
            if hard == resource.RLIM_INFINITY or most <= hard:
                resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
        signal.setitimer(signal.ITIMER_PROF, question.seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if limits is not None:
            resource.setrlimit(resource.RLIMIT_DATA, limits)


def _answer(data: bytes, memory: PixelMemory, pixel_bytes: int, settings: Settings) -> dict[str, Any]:
    """Decode an image and describe the result.

    Returns:
        `size`, width and height, and `decoded`, whether the pixels were written, which they are not if they
            do not fit. Or `problem` and `error`, the reason and the name of the class of an ImageProblem.
    """
    red, green, blue = settings["background"]
    background: Color = (red, green, blue)
    try:
        with opened(data, settings["max_pixels"]) as image:
            if image.width * image.height * 4 > pixel_bytes:
                return {"size": image.size, "decoded": False}
            flat = flattened(image, background, memory.canvas(image.size))
        memory.write(flat)
        return {"size": flat.size, "decoded": True}
    except ImageProblem as problem:
        return {"problem": problem.reason, "error": problem.error.__name__}


def _keep_memory() -> None:
    """Keep freed memory for the next image instead of returning it; `_give_back_memory` bounds it."""
    with suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _give_back_memory() -> None:
    gc.collect()
    with suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
