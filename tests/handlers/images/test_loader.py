"""A request's images together: order of errors, caching by content, decoding once."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from PIL import Image

from handlers.errors import ImageError, ImageTooLarge
from handlers.images import ImageProblem
from handlers.images.limits import DecodedCache, ImageLimits
from handlers.images.loader import ImageLoader
from handlers.request import ImagePart, LoadedImage
from tests.support.image_files import BAD, data_url

BAD_BASE64 = "data:image/png;base64,!"


async def load(loader: ImageLoader, *urls: str, **options: Any) -> list[LoadedImage]:
    parts = [ImagePart(url) for url in urls]
    await loader.load(parts, **options)
    return [part.loaded for part in parts if part.loaded is not None]


def test_images_come_in_order() -> None:
    async def main() -> None:
        loader = ImageLoader(ImageLimits())
        loaded = await load(loader, *map(data_url, ["red", "lime", "blue"]), f" {data_url()}\n")
        assert [decoded.image.getpixel((0, 0)) for decoded in loaded] == [
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
        done = ImagePart("file:///nowhere", loaded=LoadedImage(Image.new("RGB", (1, 1)), b"digest"))
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
        loading = asyncio.create_task(load(loader, data_url(), "http://slow.test/", data_url("lime"), "file:///x"))
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
        (BAD, ImageError, "image 1: its data is not in a supported format (JPEG, PNG, WEBP, GIF, BMP, TIFF"),
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
def test_messages_name_the_image(url: str, kind: type[ImageError], message: str) -> None:
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


async def obtained(cache: DecodedCache, name: bytes, side: int = 10) -> bool:
    """Whether it had to be decoded."""

    async def decode() -> Image.Image:
        return Image.new("RGB", (side, side))

    return (await cache.obtain(name, decode))[1]


def test_the_least_recently_used_image_leaves_first() -> None:
    async def main() -> None:
        cache = DecodedCache(3 * 10 * 10 * 4)
        assert [await obtained(cache, name) for name in (b"a", b"b", b"c")] == [True] * 3
        assert not await obtained(cache, b"a")
        assert await obtained(cache, b"d")
        assert cache.size == 1200
        assert [await obtained(cache, name) for name in (b"a", b"c", b"d")] == [False] * 3
        assert await obtained(cache, b"b")
        assert await obtained(cache, b"large", side=20)
        assert not await obtained(cache, b"b")
        assert cache.size == 1200

    asyncio.run(main())


def test_without_a_cache_everything_is_decoded() -> None:
    async def main() -> None:
        cache = DecodedCache(0)
        assert await obtained(cache, b"a")
        for _ in range(3):
            await asyncio.sleep(0)  # what has decoded it lets go of it
        assert await obtained(cache, b"a")
        assert cache.size == 0

    asyncio.run(main())


def test_a_second_asker_gets_the_first_ones_image_or_failure_which_is_not_kept() -> None:
    async def main() -> None:
        cache, go_on, decoded = DecodedCache(1000), asyncio.Event(), 0

        async def slow() -> Image.Image:
            nonlocal decoded
            decoded += 1
            await go_on.wait()
            return Image.new("RGB", (1, 1))

        async def broken() -> Image.Image:
            await go_on.wait()
            raise ImageProblem("broken")

        good = [asyncio.create_task(cache.obtain(b"a", slow)) for _ in range(2)]
        bad = [asyncio.create_task(cache.obtain(b"b", broken)) for _ in range(2)]
        await asyncio.sleep(0)
        go_on.set()
        (first, by_first), (second, by_second) = await asyncio.gather(*good)
        assert (first, by_first, by_second, decoded) == (second, True, False, 1)
        failures = await asyncio.gather(*bad, return_exceptions=True)
        assert [str(failure) for failure in failures] == ["broken"] * 2
        assert (await cache.obtain(b"b", slow))[1]

    asyncio.run(main())


@pytest.mark.parametrize("leaving", [(0,), (1,), (0, 1)])
def test_decoding_ends_only_with_the_last_who_waits_for_it(leaving: tuple[int, ...]) -> None:
    async def main() -> None:
        cache, go_on, ended = DecodedCache(1000), asyncio.Event(), asyncio.Event()

        async def slow() -> Image.Image:
            try:
                await go_on.wait()
            finally:
                ended.set()
            return Image.new("RGB", (1, 1))

        askers = [asyncio.create_task(cache.obtain(b"a", slow)) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for number in leaving:
            askers[number].cancel()
        done, _ = await asyncio.wait(askers, return_when=asyncio.FIRST_COMPLETED)
        assert {askers[number] for number in leaving} >= done
        if len(leaving) == 2:
            await asyncio.wait_for(ended.wait(), 10)
            again = asyncio.create_task(cache.obtain(b"a", slow))
            go_on.set()
            assert (await again)[1]
        else:
            assert not ended.is_set()
            go_on.set()
            image, _ = await askers[1 - leaving[0]]
            assert (await cache.obtain(b"a", slow))[0] is image

    asyncio.run(main())


def test_a_bad_exception_in_the_operators_list_is_said_at_once() -> None:
    with pytest.raises(ValueError, match=r"'\*\.test' is not a host name"):
        ImageLoader(ImageLimits(allowed_domains=("*.test",)))
