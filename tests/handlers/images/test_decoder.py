"""Encoded images of every kind, whole and broken, to upright RGB."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from handlers.errors import ImageError, ImageTooLarge
from handlers.images import ImageProblem
from handlers.images.decoder import FORMATS, convert, decode, prepare_pillow
from handlers.images.jpeg import MAX_SCANS
from tests.support.image_files import png

LIMIT = 1_000_000
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def quarters(size: int = 32) -> Image.Image:
    """Red and green above, blue and white below: every turn and flip of it looks different."""
    image = Image.new("RGB", (size, size))
    half = size // 2
    for place, colour in zip([(0, 0), (half, 0), (0, half), (half, half)], [RED, GREEN, BLUE, WHITE], strict=True):
        image.paste(colour, (*place, place[0] + half, place[1] + half))
    return image


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours in the middle of the quarters, rounded to full or nothing."""
    near, far = image.width // 4, image.width * 3 // 4
    pixels = [image.getpixel(place) for place in [(near, near), (far, near), (near, far), (far, far)]]
    return [tuple(255 * (value > 127) for value in pixel) for pixel in pixels if isinstance(pixel, tuple)]


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind: str) -> None:
    image = decode(encoded(quarters(), kind), LIMIT)
    assert (image.mode, image.size) == ("RGB", (32, 32))
    assert corners(image) == [RED, GREEN, BLUE, WHITE]
    assert type(image) is Image.Image
    assert not image.info


@pytest.mark.parametrize("kind", ["EPS", "ICNS", "ICO", "PDF", "PPM", "TGA", "PCX", "SGI"])
def test_formats_that_nobody_needs_are_refused(kind: str) -> None:
    with pytest.raises(ImageProblem, match=r"not in a supported format \(JPEG, PNG, WEBP, GIF, BMP, TIFF"):
        decode(encoded(quarters(), kind), LIMIT)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "its file is empty"),
        (b"hello", "not in a supported format"),
        (b"\xff\xd8\xff", "its JPEG header is truncated or damaged"),
        (b"  <!DOCTYPE html><html>", "web page"),
        (b"<?xml version='1.0'?><svg xmlns='...'/>", "SVG images are not supported"),
    ],
)
def test_what_is_no_image(data: bytes, reason: str) -> None:
    with pytest.raises(ImageProblem) as caught:
        decode(data, LIMIT)
    assert reason in caught.value.reason
    assert caught.value.error is ImageError


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_honoured(kind: str, orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = quarters().transpose(undo[orientation]) if orientation in undo else quarters()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encoded(stored, kind, exif=exif), LIMIT)
    assert corners(image) == [RED, GREEN, BLUE, WHITE]
    assert not image.getexif()


def test_orientation_swaps_the_sides() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif), LIMIT).size == (20, 30)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_damaged_metadata_does_not_cost_the_image(exif: bytes) -> None:
    assert corners(decode(encoded(quarters(), "JPEG", exif=exif), LIMIT)) == [RED, GREEN, BLUE, WHITE]


def test_transparent_parts_show_white() -> None:
    image = Image.new("RGBA", (4, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    for kind, options in [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]:
        flat = decode(encoded(image, kind, **options), LIMIT)
        assert [flat.getpixel((x, 0)) for x in range(3)] == [RED, WHITE, (127, 127, 127)], kind


def test_every_kind_of_transparency() -> None:
    grey = Image.new("LA", (2, 1), (0, 255))
    grey.putpixel((1, 0), (0, 0))
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    black = (0, 0, 0)
    cases = [
        (encoded(grey, "PNG"), [black, WHITE]),
        (encoded(palette, "PNG", transparency=1), [RED, WHITE]),
        (encoded(palette, "PNG", transparency=b"\xff\x00"), [RED, WHITE]),
        (encoded(palette, "GIF", transparency=1), [RED, WHITE]),
        (encoded(palette.convert("RGB"), "PNG", transparency=BLUE), [RED, WHITE]),
        (encoded(grey.getchannel("L"), "PNG", transparency=0), [WHITE, WHITE]),
        (encoded(palette, "PNG"), [RED, BLUE]),
    ]
    for data, expected in cases:
        flat = decode(data, LIMIT)
        assert [flat.getpixel((x, 0)) for x in range(2)] == expected


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(kind: str) -> None:
    samples = np.array([[0, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    flat = decode(encoded(Image.fromarray(samples), kind), LIMIT)
    assert [flat.getpixel((x, 0)) for x in range(4)] == [(value,) * 3 for value in (0, 0x12, 0x80, 0xFF)]


def test_sixteen_bit_colour() -> None:
    body = b"\0" + struct.pack(">6H", 0xFFFF, 0x8000, 0, 0, 0, 0x1234)
    flat = decode(png(2, 1, body, depth=16), LIMIT)
    assert [flat.getpixel((x, 0)) for x in range(2)] == [(255, 128, 0), (0, 0, 0x12)]


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("1", "PNG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("YCbCr", "TIFF"),
        ("F", "TIFF"),
        ("I", "TIFF"),
    ],
)
def test_other_colour_models(mode: str, kind: str) -> None:
    flat = decode(encoded(Image.new("RGB", (8, 8), "white").convert(mode), kind), LIMIT)
    assert flat.mode == "RGB"
    if mode != "I":
        assert min(min(band) for band in flat.getextrema()) >= 250  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_frame_of_several(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    pixel = decode(data, LIMIT).getpixel((4, 4))
    assert isinstance(pixel, tuple)
    assert pixel[0] > 240
    assert pixel[2] < 15


def test_one_pixel() -> None:
    assert decode(encoded(Image.new("RGB", (1, 1), "red"), "PNG"), LIMIT).getpixel((0, 0)) == RED


@pytest.mark.parametrize("kind", FORMATS)
def test_half_an_image(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    with pytest.raises(ImageProblem) as caught:
        decode(data[: len(data) // 2], LIMIT)
    assert caught.value.error is ImageError


@pytest.mark.parametrize(
    "size", [(1001, 1000), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (14_000, 14_000), (1_000_001, 1)]
)
def test_bombs_are_refused_by_their_header(size: tuple[int, int]) -> None:
    with pytest.raises(ImageProblem) as caught:
        decode(png(*size), LIMIT)
    assert caught.value.error is ImageTooLarge
    assert caught.value.reason == "it has more than 1000000 pixels (option.max_image_pixels)"


def test_a_cap_above_pillows_own() -> None:
    before = Image.MAX_IMAGE_PIXELS
    assert before is not None
    try:
        Image.MAX_IMAGE_PIXELS = 100
        data = encoded(Image.new("RGB", (20, 20)), "PNG")
        with pytest.raises(ImageProblem) as caught:
            decode(data, 1000)
        assert caught.value.error is ImageTooLarge
        prepare_pillow(1000)
        assert decode(data, 1000).size == (20, 20)
        prepare_pillow(10)
        assert Image.MAX_IMAGE_PIXELS == 1000
    finally:
        Image.MAX_IMAGE_PIXELS = before


def test_no_pixels_at_all() -> None:
    with pytest.raises(ImageProblem):
        decode(png(0, 5), LIMIT)


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    data = encoded(quarters(), "JPEG", progressive=True)
    assert corners(decode(data, LIMIT)) == [RED, GREEN, BLUE, WHITE]
    scan = data.rindex(b"\xff\xda")
    many = data[:-2] + data[scan:-2] * MAX_SCANS + b"\xff\xd9"
    with pytest.raises(ImageProblem, match="more than 100 scans"):
        decode(many, LIMIT)


def test_a_text_chunk_bomb() -> None:
    data = png(1, 1, b"\0\0\0\0")
    text = b"zTXt" + b"k\0\0" + zlib.compress(b"\0" * 50_000_000)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    tracemalloc.start()
    try:
        assert decode(data[:33] + chunk + data[33:], LIMIT).getpixel((0, 0)) == (0, 0, 0)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(data + chunk)
    finally:
        tracemalloc.stop()


SEEDS = {kind: encoded(quarters(), kind) for kind in FORMATS}


@pytest.mark.filterwarnings("ignore:::PIL")
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SEEDS)), st.data())
def test_damage_is_always_answered_for(kind: str, draw: st.DataObject) -> None:
    data = bytearray(SEEDS[kind])
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, min(len(data), 400) - 1))] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(ImageProblem):
        assert decode(bytes(data), 10_000).mode == "RGB"


def test_what_is_transparent_shows_the_background_that_is_asked_for() -> None:
    clear = Image.new("RGBA", (4, 4))
    assert decode(encoded(clear, "PNG"), LIMIT, (0, 0, 255)).getpixel((0, 0)) == BLUE
    assert convert(clear, LIMIT, (0, 0, 255)).getpixel((0, 0)) == BLUE
    assert convert(clear, LIMIT).getpixel((0, 0)) == WHITE


def test_an_open_image_is_converted_and_itself_left_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = Image.open(io.BytesIO(encoded(Image.new("RGB", (30, 20), RED), "PNG", exif=exif)))
    flat = convert(opened, LIMIT)
    assert (flat.size, flat.mode, opened.size) == ((20, 30), "RGB", (30, 20))
    flat.putpixel((0, 0), BLUE)
    assert opened.getpixel((0, 0)) == RED
    with pytest.raises(ImageProblem, match="pixels"):
        convert(Image.new("RGB", (0, 4)), LIMIT)
    with pytest.raises(ImageProblem, match="more than 5 pixels"):
        convert(opened, 5)
    closed = Image.open(io.BytesIO(encoded(opened, "PNG")))
    closed.close()
    with pytest.raises(ImageProblem, match="closed"):
        convert(closed, LIMIT)
