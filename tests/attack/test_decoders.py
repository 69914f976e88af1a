"""Images made to hold up, fill or crash whatever decodes them: each costs itself alone, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image

from handlers.errors import ImageTooLarge, Unavailable
from handlers.images import ImageProblem
from handlers.images.decoder import FORMATS, decode
from handlers.images.decoder_pool import DecoderPool, TimeLimits
from handlers.images.formats import Header, read_header
from handlers.images.limits import ImageLimits
from handlers.images.loader import ImageLoader
from handlers.images.pixel_memory import REUSED_BYTES, PixelMemory, new_memory
from handlers.request import ImagePart
from tests.attack import corpus
from tests.support.live import LiveServer, chat_body, children_running, data_url
from tests.support.shapes import SHAPES

MAX_PIXELS = 89_478_485


def jpeg_of_segments(count: int) -> bytes:
    file = saved(Image.new("RGB", (16, 16)), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 18) + b"Exif\0\0" + bytes(10)
    return file[:2] + segment * count + file[2:]


def tiff(width: int, height: int, compression: int, strips: list[bytes]) -> bytes:
    """Black and white when it is a fax (compression 3), else grey; strips of equal numbers of rows."""
    bits, count = (1 if compression == 3 else 8), len(strips)
    size = 8 + 2 + 12 * 9 + 4
    offsets, lengths = size, size + 4 * count
    first = lengths + 4 * count
    many = count > 1
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, compression), (262, 3, 1, 1),
        (273, 4, count, offsets if many else first), (277, 3, 1, 1), (278, 4, 1, height // count),
        (279, 4, count, lengths if many else len(strips[0])),
    ]  # fmt: skip
    parts = [b"II*\0" + struct.pack("<LH", 8, len(entries))]
    parts += [struct.pack("<HHLL", *entry) for entry in entries]
    starts = [first]
    for strip in strips[:-1]:
        starts.append(starts[-1] + len(strip))
    parts += [bytes(4), struct.pack(f"<{count}L", *starts), struct.pack(f"<{count}L", *map(len, strips))]
    return b"".join([*parts, *strips])


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(seed: int, side: int = 64) -> Image.Image:
    return Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(side * side * 3))


def url_of(file: bytes) -> str:
    import base64

    return "data:;base64," + base64.b64encode(file).decode()


def with_pool(work: Callable[[DecoderPool], Awaitable[None]], most: int = 2, memory: int = 1 << 30) -> None:
    async def main() -> None:
        pool = DecoderPool(ImageLimits(max_pixels=MAX_PIXELS, memory_bytes=memory), most)
        before = {child.pid for child in psutil.Process().children()}
        try:
            await asyncio.wait_for(work(pool), 120)
        finally:
            await pool.aclose()
        after = {child.pid for child in psutil.Process().children()}
        assert after <= before, "no decoder is left"

    asyncio.run(main())


async def decoded(pool: DecoderPool, file: bytes) -> Image.Image:
    return await pool.decode(file, read_header(file) or await pool.measure(file))


async def at_work_and_stopped(pool: DecoderPool, file: bytes) -> tuple[asyncio.Task[Image.Image], int]:
    """A decode that has been given to the pool's only decoder, which does not run. And the decoder's id."""
    await decoded(pool, saved(noise(0), "PNG"))
    (worker,) = pool._idle
    os.kill(worker.child.pid, signal.SIGSTOP)
    task = asyncio.create_task(decoded(pool, file))
    while pool._idle:  # noqa: ASYNC110
        await asyncio.sleep(0)
    return task, worker.child.pid


def test_many_images_at_once_all_come_out_right() -> None:
    files = {number: saved(noise(number), "PNG") for number in range(200)}
    files |= {side: saved(noise(side, side), "PNG") for side in (600, 800, 1500)}  # the last in memory of its own

    async def work(pool: DecoderPool) -> None:
        images = await asyncio.gather(*(decoded(pool, file) for file in files.values()))
        for number, image in zip(files, images, strict=True):
            assert image.tobytes() == noise(number, image.width).tobytes()
        assert (pool.died, pool.killed) == (0, 0)
        assert 1 <= pool.started <= 2  # the first may be done with all before the second is there

    with_pool(work)


def test_large_images_are_not_copied_and_their_memory_goes_with_them() -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:image")

    async def work(pool: DecoderPool) -> None:
        await decoded(pool, saved(noise(0), "PNG"))
        gc.collect()  # or files of earlier tests would be closed in between
        before, descriptors = mappings(), psutil.Process().num_fds()
        images = [await decoded(pool, saved(noise(side, side), "PNG")) for side in (1500, 1600)]
        assert mappings() == before + 2
        assert psutil.Process().num_fds() <= descriptors
        changed = images[0]._new(images[0].im)
        images[0].putpixel((0, 0), (1, 2, 3))  # Pillow copies it first
        assert changed.getpixel((0, 0)) == noise(1500, 1500).getpixel((0, 0))
        del changed
        images.clear()
        for _ in range(3):
            await asyncio.sleep(0)  # the event loop lets go of its last result
        assert mappings() == before

    with_pool(work, most=1)


def test_memory_that_is_used_again_shows_nothing_of_the_image_before() -> None:
    memory = PixelMemory(new_memory(REUSED_BYTES), REUSED_BYTES)
    for side in (64, 800, 1024):
        assert memory.canvas((side, side)).tobytes() == bytes(side * side * 3)
        memory.write(noise(side, 1024))
        assert memory.copy((1024, 1024)).tobytes() == noise(side, 1024).tobytes()


def test_an_image_that_nobody_waits_for_leaves_a_decoder_that_is_soon_done_with_it() -> None:
    large = saved(noise(1, 1300), "PNG")  # 5 MB, more than the socket takes

    async def work(pool: DecoderPool) -> None:
        task, pid = await at_work_and_stopped(pool, large)
        waiting = asyncio.create_task(decoded(pool, saved(noise(2), "PNG")))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        header = read_header(large)
        assert header is not None
        assert pool.memory.used >= header.working_bytes + header.pixels * 4
        os.kill(pid, signal.SIGCONT)
        assert (await waiting).tobytes() == noise(2).tobytes()
        assert (pool.started, pool.died, pool.killed) == (1, 0, 0)
        assert pool.memory.used == 0

    with_pool(work, most=1)


def test_an_image_whose_decoder_is_killed_goes_to_another() -> None:
    file = saved(noise(1), "PNG")

    async def work(pool: DecoderPool) -> None:
        task, pid = await at_work_and_stopped(pool, file)
        waiting = asyncio.create_task(decoded(pool, saved(noise(2), "PNG")))
        os.kill(pid, signal.SIGKILL)
        assert (await task).tobytes() == noise(1).tobytes()
        assert (await waiting).tobytes() == noise(2).tobytes()
        assert (pool.started, pool.died, pool.killed) == (2, 0, 1)
        assert pool.memory.used == 0

    with_pool(work, most=1)


def test_an_image_whose_decoders_are_killed_twice_is_our_fault() -> None:
    large = saved(Image.new("RGB", (8000, 8000)), "PNG")

    async def work(pool: DecoderPool) -> None:
        task = asyncio.create_task(decoded(pool, large))
        while pool.killed < 2:
            for worker in pool._alive.difference(pool._idle):
                worker.child.kill()
            await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="its decoder was killed; try again"):
            await task
        assert (await decoded(pool, saved(noise(1), "PNG"))).size == (64, 64)
        assert (pool.started, pool.died) == (3, 0)
        assert pool.memory.used == 0

    with_pool(work, most=1)


def test_a_decoder_that_crashes_fails_its_image_alone() -> None:
    file = saved(noise(1), "PNG")

    async def work(pool: DecoderPool) -> None:
        task, pid = await at_work_and_stopped(pool, file)
        waiting = asyncio.create_task(decoded(pool, saved(noise(2), "PNG")))
        os.kill(pid, signal.SIGSEGV)
        os.kill(pid, signal.SIGCONT)
        with pytest.raises(ImageProblem, match="its decoder failed on it"):
            await task
        assert (await waiting).size == (64, 64)
        assert (await decoded(pool, file)).size == (64, 64)
        assert (pool.started, pool.died, pool.killed) == (2, 1, 0)
        assert pool.memory.used == 0

    with_pool(work, most=1)


def test_an_image_of_a_stopped_decoder_goes_to_another_that_runs() -> None:
    async def work(pool: DecoderPool) -> None:
        pool.warm_up()
        while len(pool._idle) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        stopped = [worker.child.pid for worker in pool._idle]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        assert (await decoded(pool, saved(noise(1), "PNG"))).tobytes() == noise(1).tobytes()
        assert (pool.started, pool.died, pool.killed) == (3, 0, 2)

    with_pool(work)


def test_grey_images_of_16_bits_use_up_no_decoder() -> None:
    samples = random.Random(5).randbytes(1500 * 1500 * 2)
    image = Image.frombytes("I;16", (1500, 1500), samples)
    file = saved(image, "PNG", compress_level=1)

    async def work(pool: DecoderPool) -> None:
        for _ in range(3):
            grey = (await decoded(pool, file)).getchannel("R")
            assert grey.tobytes() == samples[1::2]  # the high bytes
        assert pool.started == 1

    with_pool(work, most=1)


def test_an_idle_decoder_that_was_killed_costs_no_image() -> None:
    async def work(pool: DecoderPool) -> None:
        await decoded(pool, saved(noise(0), "PNG"))
        (worker,) = pool._idle
        os.kill(worker.child.pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(worker.child.pid)] if psutil.pid_exists(worker.child.pid) else [], 10)
        assert (await decoded(pool, saved(noise(1), "PNG"))).size == (64, 64)
        assert (pool.started, pool.died) == (2, 0)

    with_pool(work, most=1)


def test_an_image_that_nobody_waits_for_ends_with_its_decoder_and_others_go_on() -> None:
    async def work(pool: DecoderPool) -> None:
        task, pid = await at_work_and_stopped(pool, saved(noise(1), "PNG"))
        waiting = asyncio.create_task(decoded(pool, saved(noise(2), "PNG")))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await waiting).size == (64, 64)
        assert (pool.started, pool.died, pool.killed) == (2, 0, 1)
        assert not psutil.pid_exists(pid)
        assert pool.memory.used == 0

    with_pool(work, most=1)


def test_a_decoder_that_does_not_run_is_our_fault() -> None:
    large = saved(Image.new("RGB", (8000, 8000)), "PNG")  # takes longer than no time at all

    async def work(pool: DecoderPool) -> None:
        await decoded(pool, saved(noise(0), "PNG"))
        pool.times = TimeLimits(wall=0.0, wall_factor=0.0)
        with pytest.raises(Unavailable, match="could not be decoded in time"):
            await decoded(pool, large)
        pool.times = TimeLimits()
        assert (await decoded(pool, saved(noise(1), "PNG"))).size == (64, 64)
        assert (pool.started, pool.died, pool.killed) == (3, 0, 2)

    with_pool(work, most=1)


def test_processor_time_is_limited() -> None:
    large = saved(Image.new("RGB", (8000, 8000)), "PNG")

    async def work(pool: DecoderPool) -> None:
        pool.times = TimeLimits(cpu=0.02, cpu_per_megapixel=0.0001)
        with pytest.raises(ImageProblem, match=r"takes too long to decode: more than 0\.0 s of processor time"):
            await decoded(pool, large)
        pool.times = TimeLimits()
        assert (await decoded(pool, large)).size == (8000, 8000)
        assert (pool.died, pool.killed) == (1, 0)

    with_pool(work, most=1)


@pytest.mark.skipif("AVIF" not in FORMATS, reason="this Pillow reads no AVIF")
def test_a_decoder_has_one_thread_on_a_machine_of_any_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    many_cores = "import os\nos.sched_getaffinity = lambda pid: set(range(128))\n"
    (tmp_path / "sitecustomize.py").write_text(many_cores)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def work(pool: DecoderPool) -> None:
        assert (await decoded(pool, saved(noise(1, 640), "AVIF"))).size == (640, 640)

    with_pool(work, most=1)


def test_memory_beyond_what_was_charged_is_refused() -> None:
    large = saved(Image.new("RGBA", (6000, 6000)), "PNG")  # converted in memory of the decoder's own

    async def work(pool: DecoderPool) -> None:
        with pytest.raises(ImageProblem, match="takes more memory than an image of its size may take") as caught:
            await pool.decode(large, Header(6000 * 6000, 1 << 20))
        assert caught.value.error is ImageTooLarge
        assert (await decoded(pool, large)).size == (6000, 6000)
        assert pool.died == 0

    with_pool(work, most=1)


def test_decoders_wait_for_memory_and_never_for_each_other() -> None:
    files = [saved(noise(number, 300), "PNG") for number in range(12)]
    most = 0

    async def work(pool: DecoderPool) -> None:
        nonlocal most
        tasks = [asyncio.create_task(decoded(pool, file)) for file in files]
        while not all(task.done() for task in tasks):
            most = max(most, pool.memory.used)
            await asyncio.sleep(0)
        assert [task.result().size for task in tasks] == [(300, 300)] * len(files)

    header = read_header(files[0])
    assert header is not None
    one = header.working_bytes + 2 * max(map(len, files))
    with_pool(work, most=4, memory=2 * one)
    assert 0 < most <= 2 * one
    with_pool(work, most=4, memory=1)  # each alone, then


def test_each_image_is_charged_also_where_it_gets_a_decoder_at_once() -> None:
    small, large = saved(noise(1), "PNG"), saved(Image.new("RGB", (3000, 3000)), "PNG")
    header = read_header(large)
    assert header is not None

    async def work(pool: DecoderPool) -> None:
        most = 0
        tasks = [asyncio.create_task(decoded(pool, file)) for file in (small, large)]
        while not all(task.done() for task in tasks):
            most = max(most, pool.memory.used)
            await asyncio.sleep(0)
        assert most >= header.working_bytes
        assert pool.memory.used == 0

    with_pool(work, most=1)


def test_large_images_that_wait_for_memory_hold_up_no_decoder() -> None:
    large, small = saved(Image.new("RGB", (4000, 4000)), "PNG"), saved(noise(1), "PNG")
    header = read_header(large)
    assert header is not None

    async def work(pool: DecoderPool) -> None:
        pool.warm_up()
        while len(pool._idle) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        stopped = pool._idle[-1].child.pid
        os.kill(stopped, signal.SIGSTOP)
        slow = [asyncio.create_task(decoded(pool, large)) for _ in range(3)]
        while len(pool._idle) == 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(3):
            await decoded(pool, small)
        assert not any(task.done() for task in slow)
        os.kill(stopped, signal.SIGCONT)
        assert [image.size for image in await asyncio.gather(*slow)] == [(4000, 4000)] * 3

    with_pool(work, memory=header.working_bytes * 3 // 2)


def test_a_file_with_more_pixels_than_it_was_charged_for_is_not_decoded() -> None:
    file = saved(noise(1), "PNG")

    async def work(pool: DecoderPool) -> None:
        with pytest.raises(ImageProblem, match="gives its size twice"):
            await pool.decode(file, Header(64 * 63, 1 << 20))

    with_pool(work)


def test_decoders_that_cannot_start_are_our_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def work(pool: DecoderPool) -> None:
        for executable in ("/bin/false", str(tmp_path / "missing")):
            monkeypatch.setattr(sys, "executable", executable)
            with pytest.raises(Unavailable, match="images cannot be decoded now"):
                await decoded(pool, saved(noise(1), "PNG"))
        monkeypatch.undo()
        assert (await decoded(pool, saved(noise(1), "PNG"))).size == (64, 64)

    with_pool(work)


def test_decoders_for_which_there_is_no_thread_are_our_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio waits for a child's end in a thread where the kernel gives it no descriptor for the process."""

    def no_thread(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    async def work(pool: DecoderPool) -> None:
        monkeypatch.setattr(asyncio, "create_subprocess_exec", no_thread)
        with pytest.raises(Unavailable, match="images cannot be decoded now"):
            await asyncio.wait_for(decoded(pool, saved(noise(1), "PNG")), 20)
        monkeypatch.undo()
        assert (await decoded(pool, saved(noise(1), "PNG"))).size == (64, 64)

    with_pool(work)


def test_closing_ends_a_decoder_that_has_failed_and_does_not_end_by_itself() -> None:
    async def work(pool: DecoderPool) -> None:
        task, pid = await at_work_and_stopped(pool, saved(noise(1), "PNG"))
        (worker,) = pool._alive
        worker.child._socket.shutdown(socket.SHUT_RDWR)
        while pool._alive:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await pool.aclose()
        assert not psutil.pid_exists(pid)
        with pytest.raises(Unavailable, match="stopping"):
            await task

    with_pool(work, most=1)


SANDBOX = """
import ctypes, struct
def refuse(*numbers):  # these system calls, with EPERM: a BPF program, each instruction of 8 bytes
    load_number, if_equal, give_back = 0x20, 0x15, 0x06
    code = struct.pack("HBBI", load_number, 0, 0, 0)
    for number in numbers:
        code += struct.pack("HBBI", if_equal, 0, 1, number) + struct.pack("HBBI", give_back, 0, 0, 0x50001)
    code += struct.pack("HBBI", give_back, 0, 0, 0x7FFF0000)
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
    return libc.prctl(22, 2, ctypes.byref(Program(len(code) // 8, code)), 0, 0)
"""


@pytest.mark.skipif(os.uname().machine != "x86_64" or sys.platform != "linux", reason="numbers of system calls")
def test_in_a_sandbox_without_limits_and_without_unnamed_memory_images_are_decoded() -> None:
    script = f"""{SANDBOX}
import asyncio, os, sys
from tests.attack.test_decoders import decoded, noise, saved, with_pool
if refuse(302, 319):  # prlimit64, memfd_create
    sys.exit(77)
try:
    os.memfd_create("refused")
    sys.exit(78)
except PermissionError:
    pass
async def work(pool):
    for side in (64, 700):
        image = await decoded(pool, saved(noise(1, side), "PNG"))
        assert image.tobytes() == noise(1, side).tobytes()
with_pool(work)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=150)
    if ran.returncode == 77:
        pytest.skip("this kernel or sandbox takes no filter of system calls")
    assert ran.returncode == 0, ran.stderr
    assert "could not be set: Operation not permitted" in ran.stderr


def test_a_decoder_that_gets_no_memory_for_pixels_leaves_no_descriptor() -> None:
    async def work(pool: DecoderPool) -> None:
        file = saved(noise(1), "PNG")
        await asyncio.sleep(0)
        gc.collect()
        this = psutil.Process()
        before, limits = this.num_fds(), resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (this.memory_info().vms + REUSED_BYTES // 2, limits[1]))
        try:
            for _ in range(3):
                with pytest.raises(Unavailable, match="images cannot be decoded now"):
                    await pool.measure(file)
            assert this.num_fds() <= before
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        assert (await decoded(pool, file)).size == (64, 64)

    with_pool(work)


def test_closing_ends_what_is_at_work() -> None:
    async def main() -> None:
        loader = ImageLoader(ImageLimits())
        first = ImagePart(data_url(noise(0)))
        await loader.load([first])
        first.release()
        (worker,) = loader.decoders._idle
        os.kill(worker.child.pid, signal.SIGSTOP)
        loading = asyncio.create_task(loader.load([ImagePart(data_url(noise(1)))]))
        while loader.decoders._idle:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await loader.aclose()
        with pytest.raises(Unavailable, match="stopping"):
            await loading
        assert not psutil.pid_exists(worker.child.pid)
        assert loader.memory.used == loader.decoders.memory.used == 0

    asyncio.run(main())


def _headers() -> Iterator[tuple[str, bytes]]:
    image = noise(3).resize((70, 50))
    modes = {
        "JPEG": ["RGB", "L", "CMYK"], "PNG": ["RGB", "RGBA", "P", "1", "I;16"], "WEBP": ["RGB", "RGBA"],
        "GIF": ["P", "L"], "BMP": ["RGB", "P", "1"], "TIFF": ["RGB", "L", "CMYK", "1"], "AVIF": ["RGB", "RGBA"],
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x112] = 6
    for form in FORMATS:
        for mode in modes[form]:
            other = Image.new(mode, image.size) if mode == "I;16" else image.convert(mode)
            yield f"{form} {mode}", saved(other, form)
    yield "JPEG progressive", saved(image, "JPEG", progressive=True, exif=exif)
    yield "WEBP lossless", saved(image, "WEBP", lossless=True)
    yield "WEBP animated", saved(image, "WEBP", save_all=True, append_images=[noise(4).resize((70, 50))])
    yield "GIF animated", saved(image, "GIF", save_all=True, append_images=[noise(4).resize((70, 50))])
    yield "TIFF big", saved(image, "TIFF", big_tiff=True)
    yield "TIFF turned", saved(image, "TIFF", exif=exif)


@pytest.mark.parametrize("file", [pytest.param(file, id=name) for name, file in _headers()])
def test_the_cheap_look_at_a_header_finds_what_pillow_finds(file: bytes) -> None:
    header = read_header(file)
    assert header is not None
    assert header.pixels == 70 * 50
    assert decode(file, MAX_PIXELS).width * decode(file, MAX_PIXELS).height == 70 * 50
    for length in range(0, len(file), max(1, len(file) // 50)):
        cut = read_header(file[:length])
        assert cut is None or cut.pixels == 70 * 50


def test_a_decoder_loads_little_and_takes_little_memory() -> None:
    script = "import sys, handlers.images.decoder_process; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    for heavy in ("asyncio", "pydantic", "torch", "transformers", "msgspec", "numpy", "ssl", "engine"):
        assert heavy not in loaded

    async def work(pool: DecoderPool) -> None:
        await decoded(pool, saved(noise(0), "PNG"))
        (worker,) = pool._idle
        assert psutil.Process(worker.child.pid).memory_info().rss < 45 << 20
        environment = psutil.Process(worker.child.pid).environ()
        assert not any("KEY" in name or "SERVING" in name for name in environment)

    os.environ["SERVING_API_KEY"] = "secret"
    try:
        with_pool(work)
    finally:
        del os.environ["SERVING_API_KEY"]


# The server


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with LiveServer(SHAPES, "log_format=json", "log_level=debug") as live:
        yield live


def decoders_of(live: LiveServer) -> list[psutil.Process]:
    return children_running(live.process.pid, "handlers.images.decoder", recursive=True)


def wait_until(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def _has_ended(process: psutil.Process) -> bool:
    """Or is a zombie, where nobody reaps orphans."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def send_and_leave(live: LiveServer, body: bytes) -> socket.socket:
    host, _, port = live.url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    return connection


def in_flight(live: LiveServer) -> float:
    return live.metrics()["lmi_requests_in_flight"]


def test_a_server_starts_its_decoders_before_any_image_comes(server: LiveServer) -> None:
    wait_until(lambda: len(decoders_of(server)) == 2)


def test_after_clients_with_slow_images_have_left_a_good_one_is_answered(server: LiveServer) -> None:
    body = json.dumps(chat_body(url_of(jpeg_of_segments(400_000)), "What?")).encode()
    for connection in [send_and_leave(server, body) for _ in range(2)]:
        connection.close()
    assert server.chat(noise(7), "What is this?").status_code == 200
    wait_until(lambda: in_flight(server) == 0)


def test_clients_that_leave_decoders_which_do_not_run(server: LiveServer) -> None:
    wait_until(lambda: server.metrics()["lmi_image_decoders_started_total"] >= 2)
    stopped = decoders_of(server)
    before = server.metrics()["lmi_image_decoders_killed_total"]
    for process in stopped:
        process.suspend()
    bodies = [json.dumps(chat_body(data_url(noise(20 + n)), "What?")).encode() for n in range(len(stopped))]
    connections = [send_and_leave(server, body) for body in bodies]
    wait_until(lambda: in_flight(server) == len(stopped))
    for connection in connections:
        connection.close()
    assert server.chat(noise(30), "What is this?").status_code == 200
    wait_until(lambda: not any(process.is_running() for process in stopped))
    assert server.metrics()["lmi_image_decoders_killed_total"] > before


def test_a_killed_decoder_costs_no_reply(server: LiveServer) -> None:
    stopped = decoders_of(server)
    for process in stopped:
        process.suspend()
    body = json.dumps(chat_body(data_url(noise(40)), "What?")).encode()
    connection = send_and_leave(server, body)
    wait_until(lambda: in_flight(server) == 1)
    for process in stopped:
        process.kill()
    reply = connection.makefile("rb").readline()
    connection.close()
    assert reply.split()[1] == b"200"
    assert server.chat(noise(41), "What is this?").status_code == 200


def test_strips_by_the_million_take_no_more_than_their_bytes(server: LiveServer) -> None:
    root = psutil.Process(server.process.pid)
    before = {child.pid: _resident(child) for child in [root, *root.children(recursive=True)]}
    file = tiff(1, 1_200_000, 1, [b"\0"] * 1_200_000)
    reply = server.chat(url_of(file), "What is this?")
    assert 400 <= reply.status_code < 500
    assert "image 0: " in reply.text
    for process in [root, *root.children(recursive=True)]:
        peak = _peak(process)
        allowed = 3 * 4 * len(file) // 3 + (50 << 20) + before.get(process.pid, 45 << 20)
        if process in decoders_of(server):
            header = read_header(file)
            assert header is not None
            allowed = (110 << 20) + header.working_bytes + header.pixels * 4 + 2 * len(file)
        assert peak < allowed, process
    assert server.chat(noise(50), "What is this?").status_code == 200


def _peak(process: psutil.Process) -> int:
    return _of_status(process, "VmHWM")


def _resident(process: psutil.Process) -> int:
    return _of_status(process, "VmRSS")


def _of_status(process: psutil.Process, name: str) -> int:
    """Bytes; 0 of a process that has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0


def test_what_libtiff_says_is_bounded_and_leaves_json_logs_valid(server: LiveServer) -> None:
    before = len(server.log)
    fax = tiff(1728, 50_000, 3, [random.Random(1).randbytes(200_000)])
    for _ in range(2):
        reply = server.chat(url_of(fax), "What is this?")
        assert "Fax3" not in reply.text
    assert server.chat(noise(60), "What is this?").status_code == 200
    wait_until(lambda: "Fax3Decode1D: Bad code word" in server.log)
    said = server.log[before:]
    assert len(said) < 1 << 20  # of 7 MB
    for line in server.log.splitlines():
        assert isinstance(json.loads(line), dict)


def test_a_server_that_is_killed_leaves_no_process_and_no_shared_memory() -> None:
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.exists() else set()
    with LiveServer(SHAPES) as live:
        assert live.chat(noise(1, 700), "What is this?").status_code == 200
        wait_until(lambda: len(decoders_of(live)) >= 2)
        children = psutil.Process(live.process.pid).children(recursive=True)
        decoders_of(live)[0].suspend()
        mine = {path for path in (set(shared.iterdir()) if shared.exists() else set()) - before if "image" in path.name}
        live.process.kill()
        live.process.wait()
    wait_until(lambda: all(_has_ended(child) for child in children))
    assert not mine


def test_offline_a_script_leaves_no_decoder(tmp_path: Path) -> None:
    image = tmp_path / "one.png"
    noise(1).save(image)
    script = f"""
import base64, psutil
from PIL import Image
from handlers import LLM, SamplingParams
llm = LLM(model={str(SHAPES)!r})
image = Image.open({str(image)!r})
one = SamplingParams(max_tokens=2)
def decoders():
    return [c.pid for c in psutil.Process().children(recursive=True) if "images.decoder" in " ".join(c.cmdline())]
llm.chat([{{"role": "user", "content": [{{"type": "image_pil", "image_pil": image}}]}}], one)
assert not decoders(), "a given image needs none"
url = "data:image/png;base64," + base64.b64encode(open({str(image)!r}, "rb").read()).decode()
llm.chat([{{"role": "user", "content": [{{"type": "image_url", "image_url": {{"url": url}}}}]}}], one)
print(*decoders())
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=150)
    assert ran.returncode == 0, ran.stderr
    pids = [int(word) for word in ran.stdout.split()[-1:]]
    assert pids
    wait_until(lambda: not any(psutil.pid_exists(pid) and not _has_ended(psutil.Process(pid)) for pid in pids))


def test_a_refusal_for_pixels_needs_no_decoder() -> None:
    async def main() -> None:
        loader = ImageLoader(ImageLimits(max_pixels=100))
        with pytest.raises(ImageTooLarge):
            await loader.load([ImagePart(data_url(noise(1)))])
        assert loader.decoders.started == 0
        await loader.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("offset", [0, 2**31, 2**63, 2**64 - 1])
def test_a_header_that_points_far_away_is_the_files_fault(offset: int) -> None:
    big_tiff = b"II+\0\x08\0\0\0" + offset.to_bytes(8, "little") + b"\0" * 64
    assert read_header(big_tiff) is None

    async def work(pool: DecoderPool) -> None:
        with pytest.raises(ImageProblem):
            await decoded(pool, big_tiff)

    with_pool(work)


def test_a_cheap_look_at_mutated_headers_never_fails() -> None:
    for _, data in corpus.mutations(2310045037, 2000):
        read_header(data)
