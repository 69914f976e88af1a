"""The memory that requests' decoded images may take: in turn, never more, always given back."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from handlers.errors import ImageError, ImageFetchTimeout, Unavailable
from handlers.images.limits import ImageLimits, ImageMemory, Share
from handlers.images.loader import ImageLoader
from handlers.request import ImagePart
from tests.support.coroutines import run
from tests.support.image_files import BAD, data_url


def taking(memory: ImageMemory, *images: tuple[str, int]) -> asyncio.Task[list[Share]]:
    return asyncio.create_task(memory.take([(name.encode(), size) for name, size in images]))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@run
async def test_turns_come_in_the_order_of_asking() -> None:
    memory = ImageMemory(10)
    (first,) = await taking(memory, ("a", 6))
    large, small = taking(memory, ("b", 8)), taking(memory, ("c", 1))
    await settle()
    assert not large.done()
    assert not small.done()  # it would fit, but then the large one might wait for ever
    first.release()
    await settle()
    assert large.done()
    assert small.done()
    assert memory.used == 9


@run
async def test_those_that_fit_pass_one_that_does_not_so_many_times() -> None:
    memory = ImageMemory(10, most_passes=2)
    (first,) = await taking(memory, ("a", 6))
    large = taking(memory, ("b", 8))
    small = [taking(memory, (name, 1)) for name in "cdef"]
    await settle()
    assert [task.done() for task in small] == [True, True, False, False]
    assert not large.done()
    first.release()
    await settle()
    assert large.done()  # 8 of 10, beside the two
    assert not small[2].done()
    large.result()[0].release()
    await settle()
    assert small[2].done()
    assert small[3].done()
    assert memory.used == 4


@run
async def test_more_than_all_of_it_is_had_alone() -> None:
    memory = ImageMemory(10)
    (first,) = await taking(memory, ("a", 1))
    huge, after = taking(memory, ("b", 50)), taking(memory, ("c", 1))
    await settle()
    assert not huge.done()
    first.release()
    await settle()
    assert huge.done()
    assert not after.done()
    huge.result()[0].release()
    huge.result()[0].release()
    await settle()
    assert after.done()
    assert memory.used == 1


@run
async def test_the_same_image_counts_once() -> None:
    memory = ImageMemory(10)
    shares = await taking(memory, ("a", 8), ("a", 8))
    (again,) = await taking(memory, ("a", 8))
    assert memory.used == 8
    for share in shares:
        share.release()
    assert memory.used == 8
    again.release()
    assert memory.used == 0


@run
async def test_whoever_gives_up_waiting_holds_up_nobody() -> None:
    memory = ImageMemory(10)
    (first,) = await taking(memory, ("a", 6))
    gone, next_ = taking(memory, ("b", 8)), taking(memory, ("c", 4))
    await settle()
    gone.cancel()
    await settle()
    assert next_.done()
    late = taking(memory, ("d", 5))
    await settle()
    first.release()  # and `late` has its turn, but is cancelled before it knows
    late.cancel()
    await settle()
    assert late.cancelled()
    assert memory.used == 4


@run
async def test_nothing_is_lost_and_nobody_starves() -> None:
    draw, memory, most = random.Random(3), ImageMemory(100), 0

    async def visit() -> None:
        nonlocal most
        images = [(bytes([draw.randrange(40)]), draw.randrange(1, 40)) for _ in range(draw.randint(1, 3))]
        shares = await memory.take([(name, 1 + name[0]) for name, _ in images])
        most = max(most, memory.used)
        try:
            await asyncio.sleep(draw.uniform(0, 0.005))
        finally:
            for share in shares:
                share.release()

    visits = [asyncio.create_task(visit()) for _ in range(300)]
    for visitor in draw.sample(visits, 60):
        await asyncio.sleep(0.001)
        visitor.cancel()
    await asyncio.gather(*visits, return_exceptions=True)
    assert memory.used == 0
    assert most <= 120


def part(colour: str, side: int = 16) -> ImagePart:
    return ImagePart(data_url(colour, side))


@run
async def test_images_wait_for_memory_before_they_are_decoded() -> None:
    loader = ImageLoader(ImageLimits(memory_bytes=2 * 16 * 16 * 4, cache_bytes=0))
    first, second, third = part("red"), part("lime"), part("blue")
    await loader.load([first, second])
    waiting = asyncio.create_task(loader.load([third]))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    assert loader.decoded == 2
    first.release()
    await waiting
    assert first.loaded is None
    assert third.loaded is not None
    for one in (first, second, third):
        one.release()
    assert loader.memory.used == 0
    await loader.aclose()


@run
async def test_a_prompt_of_more_than_all_memory_is_loaded_alone() -> None:
    loader = ImageLoader(ImageLimits(memory_bytes=100))
    parts = [part("red"), part("lime")]
    await loader.load(parts)
    assert all(one.loaded for one in parts)
    other = [part("blue"), part("white")]
    waiting = asyncio.create_task(loader.load(other))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    for one in parts:
        one.release()
    await waiting
    assert all(one.loaded for one in other)
    await loader.aclose()


@run
async def test_waiting_for_memory_ends_with_the_requests_time() -> None:
    loader = ImageLoader(ImageLimits(memory_bytes=1024))
    first, second = part("red"), part("lime")
    await loader.load([first])
    with pytest.raises(ImageFetchTimeout, match="image 3: it was not ready"):
        await loader.load([second], time.monotonic() + 0.05, 3)
    assert (second.loaded, loader.memory.used) == (None, 1024)
    first.release()
    await loader.load([second])
    await loader.aclose()


@run
async def test_a_failed_load_gives_everything_back() -> None:
    damaged = ImagePart(data_url(side=64)[:100])  # its header is whole
    loader = ImageLoader(ImageLimits())
    for bad in (ImagePart(BAD), damaged):
        good = part("red")
        with pytest.raises(ImageError, match="image 1: "):
            await loader.load([good, bad, part("lime")])
        assert good.loaded is None
        assert loader.memory.used == 0
    await loader.aclose()


@run
async def test_what_somebody_holds_is_not_decoded_again() -> None:
    loader = ImageLoader(ImageLimits(cache_bytes=0))
    first, second, third = part("red"), part("red"), part("red")
    await loader.load([first])
    await loader.load([second])
    assert first.loaded is second.loaded
    assert loader.decoded == 1
    first.release()
    second.release()
    await loader.load([third])
    assert loader.decoded == 2
    await loader.aclose()


@run
async def test_a_closed_loader_says_that_the_server_stops() -> None:
    loader = ImageLoader(ImageLimits())
    await loader.aclose()
    with pytest.raises(Unavailable):
        await loader.load([part("red")])
