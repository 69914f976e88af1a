"""Metadata that the pixels do not need: large, damaged or hostile, it never costs the image."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from handlers.images import MAX_PARTS, ImageProblem
from handlers.images.decoder import convert, decode
from handlers.images.formats import without_metadata
from handlers.images.jpeg import MAX_SCANS, MAX_SEGMENTS

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

LIMIT = 1_000_000
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)
_exif = Image.Exif()
_exif[0x0112] = 6
_exif[0x010F] = "a camera"
SIDEWAYS = _exif.tobytes()
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def encoded(kind: str, image: Image.Image = IMAGE, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def riff(name: bytes, content: bytes) -> bytes:
    return struct.pack("<4sL", name, len(content)) + content + b"\0" * (len(content) % 2)


PNG, JPEG, WEBP = encoded("PNG"), encoded("JPEG"), encoded("WEBP", exif=SIDEWAYS, lossless=True)
GIF, AVIF = encoded("GIF"), encoded("AVIF", exif=SIDEWAYS, xmp=XMP)
DEFLATED = zlib.compress(b"\0" * 50_000_000)


def png(*chunks: bytes) -> bytes:
    """With the chunks before the pixels."""
    return PNG[:33] + b"".join(chunks) + PNG[33:]


def jpeg(*segments: bytes) -> bytes:
    """With the segments after JFIF's."""
    return JPEG[:20] + b"".join(segments) + JPEG[20:]


def pixels(data: bytes) -> bytes:
    return decode(data, LIMIT).tobytes()


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"Comment\0\0" + DEFLATED),
        chunk(b"iTXt", b"Comment\0\1\0\0\0" + DEFLATED),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + DEFLATED),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + DEFLATED),
        chunk(b"tEXt", b"Comment\0" + b"x" * 2_000_000),
        chunk(b"iCCP", b"profile\0\0" + DEFLATED),
        chunk(b"eXIf", b"MM\0*" + b"x" * 2_000_000),
        chunk(b"zTXt", b"Comment\0\7?"),
        chunk(b"iCCP", b"profile\0\7?"),
        chunk(b"iCCP", b"x"),
        chunk(b"gAMA", b""),
        chunk(b"cHRM", b"1"),
        chunk(b"sRGB", b""),
        chunk(b"pHYs", b""),
        chunk(b"tRNS", b""),
        chunk(b"acTL", b""),
        chunk(b"fcTL", b"\0" * 26),
        chunk(b"acTL", b"\0\0\0\2\0\0\0\0") + chunk(b"fcTL", b"\0\0\0\7" + b"\xff" * 22),
        chunk(b"fdAT", b"?"),
        *(chunk(name, b"Comment\0text", 1) for name in (b"tEXt", b"zTXt", b"iTXt", b"tIME", b"prVt", b"eXIf")),
    ],
)
def test_a_png_with_a_large_or_broken_chunk(extra: bytes) -> None:
    assert pixels(png(extra)) == IMAGE.tobytes()
    assert pixels(PNG[:-12] + extra + PNG[-12:]) == IMAGE.tobytes()


def test_a_png_whose_last_chunks_are_cut_short_or_no_chunks() -> None:
    for tail in (b"", chunk(b"tEXt", b"Comment\0text")[:-7], b"\xff" * 20, b"\0\0\0\5tEXt"):
        assert pixels(PNG[:-12] + tail) == IMAGE.tobytes()


def test_a_png_with_a_text_between_its_pixels() -> None:
    (length,) = struct.unpack(">I", PNG[33:37])
    body = PNG[41 : 41 + length]
    parts = chunk(b"IDAT", body[:99]) + chunk(b"tEXt", b"k\0v") + chunk(b"IDAT", body[99:])
    assert pixels(PNG[:33] + parts + PNG[-12:]) == IMAGE.tobytes()


@pytest.mark.parametrize(
    "extra",
    [
        segment(0xE0, b"JFIF\0"),
        segment(0xE0, b"JFXX\0"),
        segment(0xEE, b"Adobe"),
        segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x1a\0\5\xff\xff\xff\xff\0\0\0\0"),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xE2, b"MPF\0"),
        segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\2\xb0\1\0\4\0\0\0\1\0\0\0\2\xb0\2\0\7\0\0\0\4?\0\0\0"),
        segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\1?"),
        segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
        segment(0xFE, b"x" * 65_533),
        b"\xff\xff\xff",
        b"\0\1\2\3",
        b"".join(segment(0xE2, b"ICC_PROFILE\0\1\xff" + b"x" * 60_000) for _ in range(40)),
    ],
)
def test_a_jpeg_with_a_large_or_broken_segment(extra: bytes) -> None:
    assert pixels(jpeg(extra)) == pixels(JPEG)
    if extra.startswith(b"\xff"):
        assert pixels(JPEG[:2] + extra + JPEG[2:]) == pixels(JPEG)


def test_a_film_after_a_jpeg_is_no_scan_and_hidden_scans_are_found() -> None:
    """Phones put a film behind the image, in which two bytes look like the beginning of a scan now and then."""
    film = np.random.default_rng(1).integers(0, 256, 2**24, dtype=np.uint8).tobytes()
    assert film.count(b"\xff\xda") > MAX_SCANS
    assert pixels(JPEG + film) == pixels(JPEG)
    progressive = encoded("JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    for between in (b"", segment(0xFE, b"\xff\xd9"), b"\xff\xd0", b"\xff\x01", b"\xff\0\xff\xff", b"\xff"):
        with pytest.raises(ImageProblem, match="more than 100 scans"):
            decode(progressive[:-2] + (between + scan) * MAX_SCANS + b"\xff\xd9", LIMIT)


@pytest.mark.parametrize("damage", ["cut", "gone", "longer", "profile"])
def test_a_webp_whose_metadata_is_cut_short(damage: str) -> None:
    data = WEBP
    if damage == "cut":
        data = data[:-5]
    elif damage == "gone":
        data = data[: data.index(b"EXIF")]
    elif damage == "longer":
        at = data.index(b"EXIF") + 4
        data = data[:at] + b"\xff\xff\xff\x7f" + data[at + 4 :]
    else:
        data = data[:30] + riff(b"ICCP", b"?") + riff(b"XMP ", b"x" * 2_000_000) + data[30:]
        data = data[:4] + struct.pack("<L", len(data) - 8) + data[8:20] + b"\x2c" + data[21:]
    upright = IMAGE.transpose(Image.Transpose.ROTATE_270) if damage == "profile" else IMAGE
    assert pixels(data) == upright.tobytes()


def test_a_gif_with_large_or_broken_extensions() -> None:
    first = GIF.index(b"\x2c", 13 + 768)
    comment = b"\x21\xfe" + (b"\xff" + b"x" * 255) * 20_000 + b"\0"
    for extra in (comment, b"\x21\xff\x0bNETSCAPE2.0\1\1\0", b"\x21\xff\0", b"\x21\x01\3abc\0"):
        assert pixels(GIF[:first] + extra + GIF[first:]) == pixels(GIF)


def tiff(order: str, big: bool, compressed: bool, *extra: tuple[int, int, int, int]) -> bytes:
    """PIXELS as TIFF. extra: entries (tag, type, count, value) among the others."""
    body = PIXELS.tobytes()
    body = zlib.compress(body) if compressed else body
    start = 16 if big else 8
    entries = [
        (256, 3, 1, 40), (257, 3, 1, 24), (258, 3, 1, 8), (259, 3, 1, 8 if compressed else 1), (262, 3, 1, 2),
        (273, 4, 1, start), (274, 3, 1, 6), (277, 3, 1, 3), (278, 3, 1, 24), (279, 4, 1, len(body)), *extra,
    ]  # fmt: skip
    offset = "Q" if big else "L"
    table = struct.pack(order + ("Q" if big else "H"), len(entries))
    for tag, kind, count, value in sorted(entries):
        field = struct.pack(order + ("H" if kind == 3 and count == 1 else offset), value)
        table += struct.pack(order + "HH" + offset, tag, kind, count) + field.ljust(8 if big else 4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    head += struct.pack(order + "HH", 8, 0) if big else b""
    place = start + len(body)
    return head + struct.pack(order + offset, place) + body + table + struct.pack(order + offset, 0)


@pytest.mark.parametrize(("order", "big"), [("<", False), (">", False), ("<", True)])  # Pillow reads no others
@pytest.mark.parametrize("compressed", [False, True])
def test_a_tiff_whose_metadata_lies_outside_of_the_file(order: str, big: bool, compressed: bool) -> None:
    upright = IMAGE.transpose(Image.Transpose.ROTATE_270).tobytes()
    plain = tiff(order, big, compressed)
    assert without_metadata(plain, LIMIT) is plain
    assert pixels(plain) == upright
    lost = [(tag, 2, 500, 2**31 - 1) for tag in (270, 271, 305, 315, 33432)]
    assert pixels(tiff(order, big, compressed, *lost, (34675, 7, 2**31, 99), (282, 5, 1, 2**30))) == upright
    whole = tiff(order, big, compressed)
    with pytest.raises(ImageProblem, match="TIFF"):
        decode(whole[: len(whole) // 2], LIMIT)


def test_an_avif_with_broken_metadata() -> None:
    start = AVIF.index(b"MM\0*") if b"MM\0*" in AVIF else AVIF.index(b"II*\0")
    broken = AVIF[:start] + b"\xff" * 8 + AVIF[start + 8 :]
    assert pixels(broken) == pixels(AVIF)
    assert len(without_metadata(AVIF, LIMIT)) == len(AVIF)


@pytest.mark.parametrize(
    "data",
    [
        encoded("JPEG", exif=SIDEWAYS),
        encoded("JPEG", exif=SIDEWAYS, icc_profile=b"?" * 70_000, comment="x" * 60_000),
        jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)),
        jpeg(segment(0xE2, b"MPF\0?"), segment(0xE1, b"Exif\0\0" + SIDEWAYS[6:]), segment(0xE2, b"ICC")),
        encoded("PNG", exif=SIDEWAYS),
        png(chunk(b"zTXt", b"k\0\0" + DEFLATED), chunk(b"eXIf", SIDEWAYS[6:]), chunk(b"tEXt", b"a", 1)),
        png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
        PNG[:-12] + chunk(b"eXIf", SIDEWAYS[6:]) + chunk(b"tEXt", b"a", 1) + PNG[-12:],
        *(
            png(chunk(name, b"Raw profile type exif\0" + packed))
            for name, packed in (
                (b"tEXt", b"\nexif\n      32\n" + SIDEWAYS.hex().encode()),
                (b"zTXt", b"\0" + zlib.compress(b"\nexif\n      32\n" + SIDEWAYS.hex().encode())),
            )
        ),
        WEBP,
        encoded("WEBP", xmp=XMP, lossless=True),
        encoded("TIFF", exif=SIDEWAYS),
    ],
)  # fmt: skip
def test_what_says_which_side_is_up_is_obeyed(data: bytes) -> None:
    assert decode(data, LIMIT).size == (24, 40)


def test_what_transparency_and_colours_need_is_kept() -> None:
    palette = IMAGE.quantize(16)
    palette.info["transparency"] = 0
    info = PngInfo()
    info.add_text("k", "v" * 10)
    for data in (
        encoded("PNG", palette, pnginfo=info),
        encoded("GIF", palette, comment=b"k"),
        encoded("PNG", IMAGE.convert("L"), transparency=3, pnginfo=info),
        encoded("TIFF", IMAGE.convert("CMYK"), compression="jpeg", description="k"),
        encoded("TIFF", palette, compression="tiff_lzw", description="k"),
        encoded("JPEG", IMAGE.convert("CMYK"), comment="k"),
    ):
        with Image.open(io.BytesIO(data)) as image:
            wanted = convert(image, LIMIT).tobytes()
        assert without_metadata(data, LIMIT) != data
        assert pixels(data) == wanted


def test_a_file_without_metadata_is_not_copied() -> None:
    for data in (
        PNG,
        JPEG,
        encoded("WEBP"),
        encoded("BMP"),
        b"",
    ):
        assert without_metadata(data, LIMIT) is data


@pytest.mark.parametrize(
    ("kind", "most", "flood"),
    [
        ("PNG", MAX_PARTS, PNG[:33] + chunk(b"IDAT", b"") * (MAX_PARTS + 1)),
        ("JPEG", MAX_SEGMENTS, JPEG[:2] + segment(0xE5, b"") * (MAX_SEGMENTS + 1) + JPEG[2:]),
        ("WEBP", MAX_PARTS, b"RIFF\xff\xff\xff\x7fWEBP" + riff(b"JUNK", b"") * (MAX_PARTS + 1)),
        ("GIF", MAX_PARTS, GIF[:10] + b"\0" + GIF[11:13] + b"\x21\xfe" + b"\1x" * (MAX_PARTS + 1)),
        ("GIF", MAX_PARTS, GIF[:10] + b"\0" + GIF[11:13] + b"\x21\xfe\0" * (MAX_PARTS + 1)),
        ("TIFF", MAX_PARTS, b"II+\0\x08\0\0\0\x10" + b"\0" * 7 + b"\xff" * 8),
        ("AVIF", MAX_PARTS, AVIF[:32] + struct.pack(">L4s", 8, b"free") * (MAX_PARTS + 1)),
    ],
)
def test_a_file_of_very_many_parts_is_refused(kind: str, most: int, flood: bytes) -> None:
    with pytest.raises(ImageProblem, match=f"its {kind} data has more than {most} parts"):
        decode(flood, LIMIT)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (PNG[:-200], "its PNG data is truncated: the image is not complete"),
        (PNG[:20], "its PNG header is truncated or damaged"),
        (PNG[:29] + b"?" + PNG[30:], "its PNG data is damaged: the checksum of its IHDR chunk is wrong"),
        (JPEG[:-300], "its JPEG data is truncated: the image is not complete"),
        (JPEG[:100], "its JPEG header is truncated or damaged"),
        (WEBP[:200], "its WEBP data is truncated: the image is not complete"),
        (GIF[:-200], "its GIF data is truncated: the image is not complete"),
        (GIF[:300], "its GIF header is truncated or damaged"),
        (encoded("BMP")[:-200], "its BMP data is truncated: the image is not complete"),
        (tiff("<", False, False)[:200], "its TIFF header is truncated or damaged"),
    ],
)
def test_a_damaged_file_says_what_is_damaged(data: bytes, reason: str) -> None:
    with pytest.raises(ImageProblem) as caught:
        decode(data, LIMIT)
    assert caught.value.reason == reason


def test_metadata_behind_the_pixels_does_not_cost_an_image_that_is_open_already() -> None:
    data = PNG[:-12] + chunk(b"zTXt", b"k\0\0" + DEFLATED) + PNG[-12:]
    assert convert(Image.open(io.BytesIO(data)), LIMIT).tobytes() == IMAGE.tobytes()


WRAPPED: dict[str, Callable[[bytes], bytes]] = {
    "JPEG EXIF": lambda content: jpeg(segment(0xE1, b"Exif\0\0" + content)),
    "JPEG EXIF's table": lambda content: jpeg(segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\3" + content)),
    "JPEG MPF": lambda content: jpeg(segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\2" + content)),
    "JPEG Photoshop": lambda content: jpeg(segment(0xED, b"Photoshop 3.0\x008BIM" + content)),
    "JPEG XMP": lambda content: jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0tiff:Orientation" + content)),
    "PNG EXIF": lambda content: png(chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\3" + content)),
    "PNG text": lambda content: png(chunk(b"tEXt", b"Raw profile type exif\0" + content)),
    "PNG XMP": lambda content: png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0tiff:Orientation" + content)),
    "WEBP EXIF": lambda content: _webp(riff(b"EXIF", b"MM\0*\0\0\0\x08\0\3" + content)),
    "WEBP XMP": lambda content: _webp(riff(b"XMP ", b"tiff:Orientation" + content)),
}


def _webp(extra: bytes) -> bytes:
    body = WEBP[8 : WEBP.index(b"EXIF")] + extra
    return b"RIFF" + struct.pack("<L", len(body)) + body


@pytest.mark.parametrize("place", WRAPPED)
@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200))
def test_no_metadata_at_all_costs_the_image(place: str, content: bytes) -> None:
    assert decode(WRAPPED[place](content), LIMIT).size in ((40, 24), (24, 40))
