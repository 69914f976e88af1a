"""Memory in which a decoder's pixels come back: anonymous, and mapped by both processes.

The kernel frees it when the last of them unmaps it or dies. Nothing appears in /dev/shm.
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
"""Size of the memory that each decoder reuses for images up to full HD.

The server copies them: that costs a tenth of what new shared pages cost, and a process may have at most 65,530
mappings. Copying a larger image would block the event loop for too long.
"""

_HUGE_PAGE = 2**21
"""From this size on, a copy gets its own mapping, in huge pages if the kernel has them: a tenth of the time."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def new_memory(size: int) -> int:
    """Create memory of that many bytes and return its descriptor. Raises OSError.

    Where anonymous memory can be sealed, its size is final: whoever receives the descriptor can neither grow it nor
    remove what another process has mapped.
    """
    try:
        descriptor = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSYS, errno.EPERM, errno.EACCES):
            raise
        with tempfile.TemporaryFile() as file:  # this system or sandbox has no anonymous memory
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
    """A process's mapping of such memory, for one image after the other; it takes over the descriptor."""

    def __init__(self, descriptor: int, length: int) -> None:
        try:
            self._memory = mmap.mmap(descriptor, length)
        finally:
            os.close(descriptor)
        self._canvas: Image.Image | None = None

    def canvas(self, size: tuple[int, int]) -> Image.Image:
        """Return an RGB image of zeros; what is decoded into it need not be copied."""
        used, self._canvas = self._canvas is not None, _image_on(self._memory, size)
        if used:  # the previous image is still there, and a decoder may leave pixels out
            self._canvas.im.paste((0, 0, 0, 0), (0, 0, *size))
        return self._canvas

    def write(self, image: Image.Image) -> None:
        """Copy the pixels into the memory, unless they were decoded into it."""
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
    """Return the RGB image without copying it. The descriptor may be closed afterwards. Raises OSError."""
    length = size[0] * size[1] * 4
    # Python's mmap would keep a descriptor open. Private, so that no mistake changes the decoder's memory.
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
    """Make an image of memory, as Pillow's `frombuffer` does for every mode but its internal RGB of four bytes."""
    return Image.Image()._new(_imaging.map_buffer(memory, size, "raw", 0, ("RGB", 0, 1)))
