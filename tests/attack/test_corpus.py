"""Whatever bytes an image is made of: it is decoded or refused with a reason, at a bounded cost.

Everything is decoded in one process under limits, which is asked what each image took: memory at its peak, beyond what
the process held before the first, and processor time.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest
from PIL import Image

from handlers.images import ImageProblem
from handlers.images.decoder import convert, decode
from tests.attack.corpus import GENERATORS, good, hostile, mutations, small
from tests.attack.decoder import MAX_PIXELS
from tests.attack.samples import encoded, photo
from tests.support.pace import too_long
from tests.support.shapes import ROOT

WORKING_BYTES = {"JPEG": 24, "PNG": 18, "WEBP": 28, "GIF": 14, "BMP": 14, "TIFF": 18, "AVIF": 30, None: 0}
"""Format -> bytes per pixel that decoding takes at its peak, beside those of the answer. The first is that of a
progressive file, whose coefficients are held."""

FIXED_BYTES = 50 << 20


@dataclass(frozen=True)
class Cost:
    """As `tests.attack.decoder` tells it. seconds: of processor time."""

    outcome: str
    pixels: int
    header: float
    seconds: float
    bytes: int
    kind: str | None
    memory: int
    children: int
    plugins: list[str]

    def excess(self) -> str:
        """What it took too much of."""
        most = 3 * self.bytes + FIXED_BYTES + self.pixels * (4 + WORKING_BYTES[self.kind])
        if self.memory > most:
            return f"{self.memory} bytes of memory, at most {most}"
        if too_long(self.header, 0.3):
            return f"{self.header:.2f} s for its header"
        seconds = 0.6 + self.pixels * 100e-9 + self.bytes * 100e-9
        return f"{self.seconds:.2f} s, at most {seconds:.2f}" if too_long(self.seconds, seconds) else ""


def costs(images: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, Cost]]:
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.attack.decoder"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        with child:
            try:
                for data in (*(data for _, data in small()), b""):
                    child.stdin.write(len(data).to_bytes(8, "big") + data)
                for name, data in images:
                    child.stdin.write(len(data).to_bytes(8, "big") + data)
                    child.stdin.flush()
                    line = child.stdout.readline()
                    assert line, f"{name}: the process ended with {child.wait()}"
                    yield name, Cost(**json.loads(line))
            finally:
                child.kill()
        errors.seek(0)
        assert b"Traceback" not in errors.read()


@pytest.mark.timeout(600)  # half a minute of processor time, on a busy machine
def test_every_hostile_image_is_decoded_or_refused_at_a_bounded_cost() -> None:
    assert len(GENERATORS) >= 40
    for name, cost in costs(hostile()):
        assert not cost.outcome.startswith("raised"), f"{name}: {cost.outcome}"
        assert not cost.excess(), f"{name}: {cost.excess()}"
        assert cost.children == 0, f"{name}: started a process"
        assert {*cost.plugins} <= {*WORKING_BYTES}, f"{name}: loaded another decoder"


@pytest.mark.timeout(600)  # half a minute of processor time, on a busy machine
def test_2000_mutations_of_small_images_are_decoded_or_refused_at_a_bounded_cost() -> None:
    decoded = 0
    for name, cost in costs(mutations(seed=20, count=2000)):
        assert not cost.outcome.startswith("raised"), f"{name}: {cost.outcome}"
        assert not cost.excess(), f"{name}: {cost.excess()}"
        decoded += cost.outcome == "decoded"
    assert 200 < decoded < 1800


@pytest.mark.timeout(600)  # half a minute of processor time, on a busy machine
@pytest.mark.filterwarnings("ignore:::PIL")
def test_good_images_are_decoded_to_the_pixels_that_are_in_them() -> None:
    for name, data in good():
        with Image.open(io.BytesIO(data)) as image:
            expected = convert(image, MAX_PIXELS)
        assert decode(data, MAX_PIXELS).tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("name", [name for name in GENERATORS if name.startswith(("JPEG and", "PNG and"))])
def test_what_stands_behind_an_image_is_not_looked_at(name: str) -> None:
    assert decode(GENERATORS[name](), MAX_PIXELS).size in ((40, 24), (16, 16))


REFUSED = {
    "JPEG of 400,000 EXIF segments": "its JPEG data has more than 4096 parts",
    "JPEG of 100,000 quantization tables": "of tables before its pixels; at most 65536 are accepted",
    "JPEG of 8 MB of padding": "its JPEG header is truncated or damaged",
    "JPEG of 20,000 scans": "it is a JPEG of 4096 pixels and more than 100 scans",
    "JPEG of 99 scans at full size": "it is a JPEG of 16000000 pixels and more than 26 scans",
    "PNG of 120,000 empty IDAT chunks": "its PNG data has more than 65536 parts",
    "WebP of 100,000 frames": "its WEBP data has more than 65536 parts",
    "WebP of a canvas of 16,384 x 16,384": r"it has more than 89478485 pixels \(option.max_image_pixels\)",
    "GIF whose frame is far larger than its screen": "it has more than 89478485 pixels",
    "BMP of run lengths and 1,000,000 x 80 pixels": "80000000 pixels in run lengths; at most 16777216",
    "TIFF of 2,000,000 strips": "its TIFF data has 2000000 strips; at most 131072 are accepted",
    "TIFF of 2,000,000 compressed strips": "its TIFF data has 2000000 strips; at most 131072 are accepted",
    "BigTIFF of 1,000,000 strips": "its TIFF data has 1000000 strips; at most 131072 are accepted",
    "TIFF of 65,535 tiles of a pixel": "its TIFF data has 65536 tiles; at most 5120 are accepted",
    "TIFF of a huge tile": "its TIFF data has 4294967296 pixels in a tile; at most 4194304 are accepted",
    "TIFF of 2,000,000 numbers in one entry": "2000000 values of tag 258; at most 64 are accepted",
    "AVIF of 16,000 items": "its AVIF data has 4097 items; at most 4096 are accepted",
    "AVIF that is larger than it says": "67108864 coded pixels for an image of 4096; at most 4210688",
    "AVIF of a file within its items": "10000 frames in an item; at most 8 are accepted",
    "AVIF sequence that is larger than it says": "it has more than 89478485 pixels",
    "AVIF sequence of 2,500,000 frames": "its AVIF data has 2500000 frames; at most 16384 are accepted",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_number_and_the_limit(name: str) -> None:
    with pytest.raises(ImageProblem, match=REFUSED[name]):
        decode(GENERATORS[name](), MAX_PIXELS)


def test_an_animation_is_its_first_frame_whatever_it_says_of_the_others() -> None:
    for name in ("AVIF of a sequence of 2^32 frames", "GIF of 30,000 frames", "TIFF of 70,000 directories"):
        assert decode(GENERATORS[name](), MAX_PIXELS).size in ((64, 64), (16, 16), (1, 1))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turned", range(1, 9))
def test_the_orientation_is_found_in_metadata_of_any_length(kind: str, turned: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turned
    exif[0x010F] = "a camera " * (100 if kind == "JPEG" else 100_000)
    data = encoded(photo(40, 24), kind, exif=exif)
    assert decode(data, MAX_PIXELS).size == ((40, 24) if turned < 5 else (24, 40))
