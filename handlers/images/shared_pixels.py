"""Pixels that a decoder process writes and the front reads, in memory that both map and that has no name.

The kernel frees it when the last of them lets go or dies; nothing appears in /dev/shm.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import tempfile
import weakref
from contextlib import suppress

from PIL import Image, _imaging

REUSED_BYTES = 2**23
"""Of the memory that each decoder has for images up to full HD, one after the other. They are copied from it: that
costs a tenth of what new shared pages do, and a process may have no more than 65,530 mappings. Copying a larger image
would hold up the event loop."""

_HUGE_PAGE = 2**21
"""From that size on, memory of its own for a copy, in huge pages where the kernel has them: they are new in a tenth of
the time."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def new_memory(size: int) -> int:
    """A descriptor of that many bytes. Where memory without a name can be sealed, its size is final: whoever gets the
    descriptor can neither grow it nor take away what another has mapped. Raises OSError."""
    try:
        descriptor = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except AttributeError:  # not on this system
        return _new_file(size)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EACCES):  # not in this sandbox
            raise
        return _new_file(size)
    try:
        os.ftruncate(descriptor, size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _new_file(size: int) -> int:
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        return os.dup(file.fileno())


class PixelMemory:
    """One end's mapping of such memory, for one image after the other; it takes the descriptor."""

    def __init__(self, descriptor: int, length: int) -> None:
        try:
            self._memory = mmap.mmap(descriptor, length)
        finally:
            os.close(descriptor)
        self._canvas: Image.Image | None = None

    def canvas(self, size: tuple[int, int]) -> Image.Image:
        """Zeros, in RGB: what is decoded into it need not be copied."""
        fresh = self._canvas is None
        self._canvas = _image_on(self._memory, size)
        if not fresh:  # the image before is still there, and a decoder may leave pixels out
            self._canvas.im.paste((0, 0, 0, 0), (0, 0, *size))
        return self._canvas

    def write(self, image: Image.Image) -> None:
        if self._canvas is None or image.im is not self._canvas.im:
            _image_on(self._memory, image.size).paste(image)

    def copy(self, size: tuple[int, int]) -> Image.Image:
        """The RGB image there. Raises OSError."""
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
    """The RGB image there, not copied; takes the descriptor. Raises OSError."""
    length = size[0] * size[1] * 4
    try:
        # not Python's own mapping, which keeps the descriptor open; private, so that nobody could change it by mistake
        address = _libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, descriptor, 0)
        if address is None or address == ctypes.c_void_p(-1).value:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)
    mapped = (ctypes.c_char * length).from_address(address)
    weakref.finalize(mapped, _libc.munmap, address, length).atexit = False
    image = _image_on(mapped, size)
    image.readonly = 1  # Pillow copies it before it changes it
    return image


def _image_on(memory: object, size: tuple[int, int]) -> Image.Image:
    """Pillow's `frombuffer` does the same for modes that files have; RGB of four bytes is only its own."""
    pixels = _imaging.map_buffer(memory, size, "raw", 0, ("RGB", 0, 1))
    return Image.Image()._new(pixels)
