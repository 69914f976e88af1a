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
from pathlib import Path

import pytest
from PIL import Image

from handlers.images.decode import convert, decode
from tests.attack.corpus import GENERATORS, good, hostile, mutations, small
from tests.attack.decoder import MAX_PIXELS

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
        if self.header > 0.3:
            return f"{self.header:.2f} s for its header"
        seconds = 0.6 + self.pixels * 100e-9 + self.bytes * 100e-9
        return f"{self.seconds:.2f} s, at most {seconds:.2f}" if self.seconds > seconds else ""


def costs(images: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, Cost]]:
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.attack.decoder"],
            cwd=Path(__file__).parent.parent.parent,
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


def test_every_hostile_image_is_decoded_or_refused_at_a_bounded_cost() -> None:
    assert len(GENERATORS) >= 40
    for name, cost in costs(hostile()):
        assert not cost.outcome.startswith("raised"), f"{name}: {cost.outcome}"
        assert not cost.excess(), f"{name}: {cost.excess()}"
        assert cost.children == 0, f"{name}: started a process"
        assert {*cost.plugins} <= {*WORKING_BYTES}, f"{name}: loaded another decoder"


def test_2000_mutations_of_small_images_are_decoded_or_refused_at_a_bounded_cost() -> None:
    decoded = 0
    for name, cost in costs(mutations(seed=20, count=2000)):
        assert not cost.outcome.startswith("raised"), f"{name}: {cost.outcome}"
        assert not cost.excess(), f"{name}: {cost.excess()}"
        decoded += cost.outcome == "decoded"
    assert 200 < decoded < 1800


@pytest.mark.filterwarnings("ignore:::PIL")
def test_good_images_are_decoded_to_the_pixels_that_are_in_them() -> None:
    for name, data in good():
        with Image.open(io.BytesIO(data)) as image:
            expected = convert(image, MAX_PIXELS)
        assert decode(data, MAX_PIXELS).tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("name", [name for name in GENERATORS if name.startswith(("JPEG and", "PNG and"))])
def test_what_stands_behind_an_image_is_not_looked_at(name: str) -> None:
    assert decode(GENERATORS[name](), MAX_PIXELS).size in ((40, 24), (16, 16))
