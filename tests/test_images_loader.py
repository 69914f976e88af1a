"""A request's pictures together: order of errors, caching by content, decoding once."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from handlers.errors import ImageError, ImageTooLarge
from handlers.images.cache import DecodedCache
from handlers.images.loader import ImageLimits, ImageLoader
from handlers.images.problem import PictureProblem
from handlers.request import ImagePart, LoadedImage


def data_url(colour: str = "red", side: int = 16) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


BAD_BASE64 = "data:image/png;base64,!"
BAD = "data:image/png;base64,AAAA"


async def load(loader: ImageLoader, *urls: str, **options: Any) -> list[LoadedImage]:
    parts = [ImagePart(url) for url in urls]
    await loader.load(parts, **options)
    return [part.loaded for part in parts if part.loaded is not None]


def test_pictures_come_in_order() -> None:
    async def main() -> None:
        loader = ImageLoader(ImageLimits())
        loaded = await load(loader, *map(data_url, ["red", "lime", "blue"]), f" {data_url()}\n")
        assert [picture.image.getpixel((0, 0)) for picture in loaded] == [
            (255, 0, 0),
            (0, 255, 0),
            (0, 0, 255),
            (255, 0, 0),
        ]
        assert await load(loader) == []
        await loader.aclose()

    asyncio.run(main())


def test_loaded_parts_are_left_alone() -> None:
    async def main() -> None:
        loader = ImageLoader(ImageLimits())
        done = ImagePart("file:///nowhere", LoadedImage(Image.new("RGB", (1, 1)), b"digest"))
        fresh = ImagePart(data_url())
        await loader.load([done, fresh])
        assert fresh.loaded is not None
        with pytest.raises(ImageError, match="image 1: "):
            await loader.load([done, ImagePart(BAD)])
        await loader.aclose()

    asyncio.run(main())


def test_the_lowest_index_is_reported_though_a_higher_one_fails_first() -> None:
    """Image 3 fails in its first step, image 1 when its name has been looked up and not found."""
    asked, go_on = threading.Event(), threading.Event()

    def resolver(*_: Any) -> list[str]:
        asked.set()
        assert go_on.wait(10)
        raise OSError

    async def main() -> None:
        loader = ImageLoader(ImageLimits(), resolver=resolver)
        loading = asyncio.create_task(
            load(loader, data_url(), "http://slow.test/", data_url("lime"), "file:///x")
        )
        await asyncio.to_thread(asked.wait)
        go_on.set()
        with pytest.raises(ImageError, match="image 1: its host name cannot be resolved") as caught:
            await loading
        assert caught.value.index == 1
        await loader.aclose()

    asyncio.run(main())


def test_a_failure_abandons_the_others() -> None:
    resolved, go_on = threading.Event(), threading.Event()

    def resolver(*_: Any) -> list[str]:
        go_on.wait(10)
        resolved.set()
        raise OSError

    async def main() -> None:
        loader = ImageLoader(ImageLimits(), resolver=resolver)
        with pytest.raises(ImageError, match="image 0: file: URLs are refused"):
            await load(loader, "file:///x", "http://slow.test/", data_url())
        assert not resolved.is_set(), "it did not wait for the others"
        assert len(asyncio.all_tasks()) == 1
        go_on.set()
        await loader.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        (BAD, ImageError, "image 1: its data is in no supported format (JPEG, PNG, WEBP, GIF, BMP, TIFF"),
        (BAD_BASE64, ImageError, "image 1: its data URL is not valid base64"),
        (data_url(side=17), ImageTooLarge, "image 1: it has more than 256 pixels (option.max_image_pixels)"),
        (
            "data:," + "x" * 1001,
            ImageTooLarge,
            "image 1: it has more than 1000 bytes (option.max_image_bytes)",
        ),
        ("", ImageError, "image 1: its URL is empty"),
    ],
)
def test_messages_name_the_picture(url: str, kind: type[ImageError], message: str) -> None:
    async def main() -> None:
        loader = ImageLoader(ImageLimits(max_pixels=256, max_bytes=1000))
        with pytest.raises(ImageError) as caught:
            await load(loader, data_url(), url)
        assert type(caught.value) is kind
        assert caught.value.message.startswith(message)
        await loader.aclose()

    asyncio.run(main())


def test_the_same_content_is_decoded_once() -> None:
    async def main() -> None:
        loader = ImageLoader(ImageLimits())
        first, again = await load(loader, data_url(), data_url())
        assert first is again
        unpadded = data_url().rstrip("=").replace("image/png", "image/jpeg")
        assert (await load(loader, unpadded))[0] is first
        (other,) = await load(loader, data_url("lime"))
        assert other.digest != first.digest
        assert (loader.decoded, loader.cache_hits, loader.fetched, loader.bytes) == (2, 2, 0, 0)
        await loader.aclose()

    asyncio.run(main())


def test_the_least_recently_used_picture_leaves_first() -> None:
    cache = DecodedCache(3 * 10 * 10 * 4)

    def obtain(name: bytes, side: int = 10) -> bool:
        return cache.obtain(name, lambda _: Image.new("RGB", (side, side)))[1]

    assert [obtain(name) for name in (b"a", b"b", b"c")] == [True] * 3
    assert not obtain(b"a")
    assert obtain(b"d")
    assert cache.size == 1200
    assert [obtain(name) for name in (b"a", b"c", b"d")] == [False] * 3
    assert obtain(b"b")
    assert obtain(b"large", side=20)
    assert not obtain(b"b")
    assert cache.size == 1200


def test_without_a_cache_everything_is_decoded() -> None:
    cache = DecodedCache(0)
    assert [cache.obtain(b"a", lambda _: Image.new("RGB", (1, 1)))[1] for _ in range(2)] == [True, True]
    assert cache.size == 0


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


def test_a_second_asker_gets_the_first_ones_picture(pool: ThreadPoolExecutor) -> None:
    cache = DecodedCache(1000)
    started, go_on = threading.Event(), threading.Event()

    def slow(_: bytes) -> Image.Image:
        started.set()
        assert go_on.wait(10)
        return Image.new("RGB", (1, 1))

    first = pool.submit(cache.obtain, b"a", slow)
    assert started.wait(10)
    future, decoded = cache.obtain(b"a", slow)  # returns although the decoding is still under way
    assert not decoded
    assert not future.done()
    go_on.set()
    assert first.result()[0].result() is future.result()


def test_a_failure_is_everybodys_but_not_kept() -> None:
    cache = DecodedCache(1000)

    def broken(_: bytes) -> Image.Image:
        raise PictureProblem("broken")

    for _ in range(2):
        future, decoded = cache.obtain(b"a", broken)
        assert decoded
        with pytest.raises(PictureProblem):
            future.result()
    assert cache.obtain(b"a", lambda _: Image.new("RGB", (1, 1)))[0].result()


def test_cancelling_one_of_two_does_not_disturb_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow(data: bytes, max_pixels: int, background: object) -> Image.Image:
        started.set()
        assert go_on.wait(10)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr("handlers.images.loader.decode", slow)
    monkeypatch.setattr("os.cpu_count", lambda: 2)

    async def main(cancelled: int) -> None:
        started.clear()
        go_on.clear()
        loader = ImageLoader(ImageLimits())
        loads = [asyncio.create_task(load(loader, data_url()))]
        await asyncio.to_thread(started.wait)
        loads.append(asyncio.create_task(load(loader, data_url())))
        behind = asyncio.create_task(load(loader, BAD_BASE64))
        with pytest.raises(ImageError):  # in the one idle thread, so after the second load was there
            await behind
        loads[cancelled].cancel()
        with pytest.raises(asyncio.CancelledError):
            await loads[cancelled]
        go_on.set()
        (picture,) = await loads[1 - cancelled]
        assert (await load(loader, data_url()))[0] is picture
        await loader.aclose()

    for cancelled in (0, 1):
        asyncio.run(main(cancelled))


def test_a_bad_exception_in_the_operators_list_is_said_at_once() -> None:
    with pytest.raises(ValueError, match=r"not a host name: '\*\.test'"):
        ImageLoader(ImageLimits(allowed_domains=("*.test",)))
