"""The process that decodes images for the server: `python -m handlers.images.decoder_process DESCRIPTOR`.

A file may be made to decode for minutes, to fill the memory, or to crash a codec. A thread could not be stopped then,
but a process can: it sets its limits for each image, and the kernel ends it when the time is up. It must stay small.

The first message that it receives is `[max_pixels, background]` in JSON, with the memory for small images; it answers
with an empty message when it is ready. Then it receives for each image a `Question` and the file, with separate memory
for a large image, and answers with one JSON object (see `_answer`).
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from PIL import AvifImagePlugin

from handlers.images import ImageProblem
from handlers.images.decoder import Color, flattened, opened, prepare_pillow
from handlers.images.pixel_memory import REUSED_BYTES, PixelMemory
from processes.inside import Parent, data_bytes

SLACK_BYTES = 48 << 20
"""Memory beyond what an image is charged for: codecs' tables and rows, Pillow's plugins, Python itself."""

_KEPT_BYTES = 32 << 20
"""When the process has grown by that much, it ends after its answer."""

_M_TRIM_THRESHOLD = -1
"""From glibc's malloc.h."""


class Question(NamedTuple):
    """Limits for one image.

    Attributes:
        pixel_bytes: Memory for the image's pixels, which came with the question or is the one for small images; 0 to
            ask for the image's size only.
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
    max_pixels, background = json.loads(first[0])
    prepare_pillow(max_pixels)
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # by default one for each core, each with memory of its own
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is in
    with suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)  # keep freed memory for the next image
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
            answer = _answer(data, memory, question.pixel_bytes, max_pixels, tuple(background))
        del data, memory
        grown += question.working_bytes
        if grown > _KEPT_BYTES:  # small images do not reach it, so the look-up is rare
            gc.collect()
            with suppress(AttributeError):  # only glibc has it
                ctypes.CDLL(None).malloc_trim(0)
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
    """Limit memory and processor time for one image.

    limits: of data, between images. now: the bytes that count against them before the image, or slightly fewer.
    """
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


def _answer(data: bytes, memory: PixelMemory, pixel_bytes: int, max_pixels: int, background: Color) -> dict[str, Any]:
    """Decode an image and describe the result.

    Returns:
        `size`, width and height, and `decoded`, whether the pixels were written, which they are not if they do not
            fit. Or `problem` and `error`, the reason and the name of the class of an ImageProblem.
    """
    try:
        with opened(data, max_pixels) as image:
            if image.width * image.height * 4 > pixel_bytes:
                return {"size": image.size, "decoded": False}
            flat = flattened(image, background, memory.canvas(image.size))
        memory.write(flat)
        return {"size": flat.size, "decoded": True}
    except ImageProblem as problem:
        return {"problem": problem.reason, "error": problem.error.__name__}


if __name__ == "__main__":
    main()
