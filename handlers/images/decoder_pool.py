"""Processes that decode images. One that a file crashes or blocks can be ended, which costs only that file."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec
from PIL import Image

from engine.machine import usable_cores
from handlers.errors import ImageError, ImageTooLarge, Unavailable, stopping
from handlers.images import ImageProblem
from handlers.images.decoder_process import QUESTION, SLACK_BYTES, Question
from handlers.images.formats import Header, unknown_header
from handlers.images.limits import ImageLimits, ImageMemory, Share
from handlers.images.pixel_memory import REUSED_BYTES, PixelMemory, new_memory, read_pixels
from processes.child import Child, Limits, Log

T = TypeVar("T")

logger = logging.getLogger(__name__)
decoder_log = logging.getLogger("processes.decoder")
"""Output of Pillow and its codecs, logged at the level debug, since it concerns clients' files."""

WARM = 2
"""Number of decoders started before the first image; more start when these are busy."""

START_SECONDS = 60.0
END_SECONDS = 2.0

GRACE_SECONDS = 1.0
"""How long an abandoned image may still be decoded before its decoder is killed. Starting another decoder costs more
than most images."""

_MAX_PASSES = 64
"""Number of images that may overtake a large one that waits for memory."""

STOPPED_SECONDS = 1.0
"""After this time with an image, a decoder that is stopped (SIGSTOP) is killed, and another one gets the image."""

_MAX_ANSWER_BYTES = 2**14
_OPEN_FILES = 64
_RESERVE_BYTES = 256 << 20
"""Memory of a decoder in addition to its image's: Python, Pillow, and the file twice."""

_ERRORS = {error.__name__: error for error in (ImageError, ImageTooLarge)}


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """How long an image may take.

    Attributes:
        cpu: Seconds of processor time for any image: many times what any format needs on a slow machine.
        cpu_per_megapixel: Additional seconds for each million pixels.
        wall: A decoder that has not answered after this many seconds plus `wall_factor` times the processor time is not
            running at all, and is killed.
        wall_factor: See `wall`.
    """

    cpu: float = 2.0
    cpu_per_megapixel: float = 0.25
    wall: float = 30.0
    wall_factor: float = 10.0

    def cpu_for(self, pixels: int) -> float:
        """Return the limit of processor time for an image, in seconds."""
        return self.cpu + self.cpu_per_megapixel * pixels / 1e6

    def wall_for(self, cpu: float) -> float:
        """Return the seconds after which a decoder that may use `cpu` seconds of processor time is killed."""
        return self.wall + self.wall_factor * cpu


class DecoderPool:
    """Decodes images in processes, which start when they are first needed, or with `warm_up`. Used on one event loop.

    Attributes:
        started: Number of decoders started.
        died: Number of decoders that ended over an image, because it crashed its codec or took too long.
        killed: Number of decoders killed while decoding: because their image was abandoned, because they did not run,
            or by the system.
        memory: Memory that decoders may use for all images being decoded.
        times: The time limits of an image; they may be changed at any time.
    """

    def __init__(self, limits: ImageLimits, most: int | None = None) -> None:
        """Create a pool without decoders. most: greatest number of decoders; None for one per core, from 2 to 8."""
        self.most = min(8, max(2, usable_cores())) if most is None else most
        self.started = 0
        self.died = 0
        self.killed = 0
        self.times = TimeLimits()
        self.memory = ImageMemory(limits.memory_bytes, _MAX_PASSES)
        self._settings = msgspec.json.encode((limits.max_pixels, limits.background))
        self._largest = unknown_header(limits.max_pixels).working_bytes + 2 * limits.max_bytes
        self._idle: list[_Decoder] = []
        self._alive: set[_Decoder] = set()
        self._starting = 0
        self._waiting: deque[asyncio.Future[_Decoder]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ending: set[asyncio.Task[int]] = set()
        self._numbers = itertools.count()
        self._closed = False

    def warm_up(self) -> None:
        """Start the first decoders in the background."""
        for _ in range(min(WARM, self.most) - len(self._alive) - self._starting):
            self._start_another()

    async def measure(self, data: bytes) -> Header:
        """Measure an image whose header `read_header` cannot read.

        Raises:
            ImageProblem: The file cannot be used.
            Unavailable: No decoder can be started.
        """
        size, _ = await self._ask(data, Question(0, 2 * len(data), self.times.cpu))
        return unknown_header(size[0] * size[1])

    async def decode(self, data: bytes, header: Header) -> Image.Image:
        """Decode an image into memory that is freed with it.

        If cancelled, the decoder is ended unless it finishes soon. An image whose decoder does not run or was killed
        goes to another one, once.

        Raises:
            ImageProblem: The file cannot be used, or has more pixels than `header` says.
            Unavailable: No decoder can be started, or the second one does not run either.
        """
        working = header.working_bytes + 2 * len(data)
        question = Question(header.pixels * 4, working, self.times.cpu_for(header.pixels))
        _, image = await self._ask(data, question)
        if image is None:
            raise ImageProblem("its file gives its size twice, and the two sizes differ")
        return image

    async def aclose(self) -> None:
        """End all decoders; their work is lost."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fail_waiting()
        self._idle.clear()
        for decoder in [*self._alive]:
            self._end(decoder)
        await asyncio.gather(*self._ending)

    async def _ask(self, data: bytes, question: Question) -> tuple[tuple[int, int], Image.Image | None]:
        """Return the image's size, and the image if it was decoded."""
        # Memory before a decoder, so that no decoder waits for memory while others could use it.
        (share,) = await self.memory.take([(b"image %d" % next(self._numbers), question.working_bytes)])
        try:
            try:
                return await self._work(await self._take(), share, question, data)
            except _DecoderLost:
                self._end_stopped()
                return await self._work(await self._take(), share, question, data)
        finally:
            share.release()

    async def _work(
        self, decoder: _Decoder, share: Share, question: Question, data: bytes
    ) -> tuple[tuple[int, int], Image.Image | None]:
        """Decode with this decoder, which is released in any case, as is the memory for the pixels."""
        memory: int | None = None
        if question.pixel_bytes > REUSED_BYTES:
            try:
                memory = new_memory(question.pixel_bytes)
            except OSError as error:
                self._give(decoder)
                raise _short_of_memory(error) from error
        try:
            answer = await self._answer(decoder, share, question, memory, data)
            image: Image.Image | None = None
            try:
                if answer.decoded:
                    reused = decoder.reused
                    image = reused.copy(answer.size) if memory is None else read_pixels(memory, answer.size)
            except OSError as error:
                raise _short_of_memory(error) from error
            finally:
                self._answered(decoder, answer)
            if answer.problem is not None:
                raise ImageProblem(answer.problem, _ERRORS[answer.error])
            return answer.size, image
        finally:
            if memory is not None:
                os.close(memory)

    async def _answer(
        self, decoder: _Decoder, share: Share, question: Question, memory: int | None, data: bytes
    ) -> _Answer:
        """Return the decoder's answer; a decoder that fails is replaced.

        If cancelled, the share is kept until the decoder is done or killed.
        """
        wall = self.times.wall_for(question.seconds)
        watch = asyncio.get_running_loop().call_later(STOPPED_SECONDS, _kill_stopped, decoder)
        try:
            async with asyncio.timeout(wall):
                decoder.child.send(QUESTION.pack(*question), data, descriptor=memory)
                return await _received(decoder, question)
        except TimeoutError as error:
            logger.warning("an image decoder did not answer for %.0f s; it is replaced", wall)
            self._kill(decoder)
            raise _DecoderLost("an image could not be decoded in time; try again", retry_after=5) from error
        except (EOFError, OSError, msgspec.MsgspecError) as error:
            if self._closed:
                raise stopping() from error
            raise await self._death(decoder, question.seconds) from error
        except asyncio.CancelledError:
            # The caller gives up its share for the pixels, so they are counted here from now on.
            kept = share.handed_over(question.pixel_bytes)
            task = self._task(self._await_abandoned(decoder, question), "await-abandoned-image")
            task.add_done_callback(lambda _: kept.release())
            raise
        except BaseException:
            self._kill(decoder)
            raise
        finally:
            watch.cancel()

    async def _await_abandoned(self, decoder: _Decoder, question: Question) -> None:
        """Wait briefly for an abandoned image; a decoder that finishes soon can be used for others."""
        try:
            async with asyncio.timeout(GRACE_SECONDS):
                answer = await _received(decoder, question)
        except (EOFError, msgspec.MsgspecError):
            await self._death(decoder, question.seconds)
        except BaseException:
            self._kill(decoder)
            raise
        else:
            self._answered(decoder, answer)

    async def _death(self, decoder: _Decoder, seconds: float) -> ImageProblem | _DecoderLost:
        """Return what the end of a decoder says about its image."""
        child = decoder.child
        code = await asyncio.shield(self._end(decoder))
        if code == -signal.SIGKILL:  # by the system, which is short of memory, or an operator: no image causes it
            self.killed += 1
            logger.warning("an image decoder was killed at work; it is replaced")
            return _DecoderLost("an image could not be decoded: its decoder was killed; try again", retry_after=5)
        self.died += 1
        if code == -signal.SIGPROF:
            return ImageProblem(
                f"it takes too long to decode: more than {seconds:.1f} s of processor time; send it smaller, or "
                "save it again"
            )
        logger.warning("an image decoder ended with %d; it printed: %s", code, child.last_output or "nothing")
        return ImageProblem("its decoder failed on it; save the image again, as PNG or JPEG")

    async def _take(self) -> _Decoder:
        """Take a free decoder, which must be given back, ended or killed. Raises Unavailable."""
        if self._closed:
            raise stopping()
        while self._idle:
            decoder = self._idle.pop()
            if not decoder.child.has_ended():
                return decoder
            self._end(decoder)
        turn: asyncio.Future[_Decoder] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._start_as_needed()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._give(turn.result())
            raise

    def _give(self, decoder: _Decoder) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(decoder)
                return
        self._idle.append(decoder)

    def _answered(self, decoder: _Decoder, answer: _Answer) -> None:
        if answer.last:
            self._end(decoder)
        else:
            self._give(decoder)

    def _kill(self, decoder: _Decoder) -> None:
        self.killed += 1
        decoder.child.kill()
        self._end(decoder)

    def _end_stopped(self) -> None:
        for decoder in [decoder for decoder in self._idle if decoder.child.is_stopped()]:
            self._idle.remove(decoder)
            self._kill(decoder)

    def _end(self, decoder: _Decoder) -> asyncio.Task[int]:
        """Remove the decoder; if an image waits for one, another is started."""
        self._alive.discard(decoder)
        self._start_as_needed()
        return self._stop(decoder.child)

    def _stop(self, child: Child) -> asyncio.Task[int]:
        """End a child and return its exit code. `aclose` waits for this task instead of cancelling it."""
        task = asyncio.create_task(child.stop(END_SECONDS), name="end-decoder")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

    def _start_as_needed(self) -> None:
        waiting = sum(not turn.done() for turn in self._waiting)
        while self._starting < waiting and len(self._alive) + self._starting < self.most and not self._closed:
            self._start_another()

    def _start_another(self) -> None:
        self._starting += 1
        self._task(self._start(), "start-decoder")

    async def _start(self) -> None:
        decoder = None
        try:
            decoder = await self._started()
        except Exception as error:  # whatever failed, waiting images must get an error
            logger.error("an image decoder could not be started: %s", str(error) or type(error).__name__)
        finally:
            self._starting -= 1
        if decoder is None:
            if not self._alive and not self._starting:
                self._fail_waiting()
            return
        self.started += 1
        self._alive.add(decoder)
        self._give(decoder)

    async def _started(self) -> _Decoder:
        descriptor = new_memory(REUSED_BYTES)
        try:
            reused = PixelMemory(os.dup(descriptor), REUSED_BYTES)
            child = await Child.start(
                "handlers.images.decoder_process",
                "plain",
                Log(decoder_log, logging.DEBUG, bounded=True),
                limits=Limits(_RESERVE_BYTES + SLACK_BYTES + self._largest, _OPEN_FILES),
            )
            try:
                async with asyncio.timeout(START_SECONDS):
                    child.send(self._settings, descriptor=descriptor)
                    await child.receive()
            except BaseException:
                child.kill()
                self._stop(child)
                raise
            return _Decoder(child, reused)
        finally:
            os.close(descriptor)

    def _fail_waiting(self) -> None:
        for turn in self._waiting:
            if not turn.done():
                turn.set_exception(Unavailable("images cannot be decoded now; the log says why", retry_after=5))
        self._waiting.clear()

    def _task(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Retrieve the exception, so that asyncio does not log it; waiting images get it anyway.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return task


@dataclass(frozen=True, slots=True, eq=False)
class _Decoder:
    """A process that is ready, and the memory for its small images."""

    child: Child
    reused: PixelMemory


class _DecoderLost(Unavailable):
    """The decoder did not run or was killed, which says nothing about the image."""


class _Answer(msgspec.Struct):
    """An answer of `handlers.images.decoder_process`; see `_answer` there. last: the decoder ends now."""

    last: bool
    size: tuple[int, int] = (0, 0)
    decoded: bool = False
    problem: str | None = None
    error: Literal["ImageError", "ImageTooLarge"] = "ImageError"


def _kill_stopped(decoder: _Decoder) -> None:
    if decoder.child.is_stopped():
        decoder.child.kill()


async def _received(decoder: _Decoder, question: Question) -> _Answer:
    answer = msgspec.json.decode(await decoder.child.receive(_MAX_ANSWER_BYTES), type=_Answer)
    width, height = answer.size
    if answer.decoded and not 0 < width * height * 4 <= question.pixel_bytes:
        raise EOFError("the decoder claims pixels that cannot be there")
    return answer


def _short_of_memory(error: OSError) -> Unavailable:
    logger.error("no memory for an image's pixels: %s", error.strerror)
    return Unavailable("the server has no memory for an image now; try again", retry_after=5)
