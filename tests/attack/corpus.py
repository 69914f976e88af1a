"""Hostile, damaged and sound images in every format served, all made by code.

`hostile()` and `mutations()` are what a server must survive; `good()` is what it must not refuse in doing so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from tests.attack.generators import GENERATORS
from tests.attack.samples import good, small

__all__ = ["GENERATORS", "good", "hostile", "mutations", "small"]

CUTS = (0.02, 0.5, 0.97)
"""Where each hostile image is truncated as well, as a share of its bytes."""


def hostile() -> Iterator[tuple[str, bytes]]:
    """(name, image) of each generator, whole and truncated."""
    for name, make in GENERATORS.items():
        data = make()
        yield name, data
        for cut in CUTS:
            yield f"{name}, cut at {cut:.0%}", data[: int(len(data) * cut)]


def mutations(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Small images of every format with bytes flipped, inserted, removed, swapped, or a length changed."""
    rng = random.Random(seed)
    seeds = [(name, data) for name, data in small() if len(data) < 20_000]
    for number in range(count):
        name, data = seeds[number % len(seeds)]
        body = bytearray(data)
        done = []
        for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
            kind, change = rng.choice(_CHANGES)
            change(rng, body)
            done.append(kind)
        yield f"{name} #{number} ({', '.join(done)})", bytes(body)


def _place(rng: random.Random, body: bytearray) -> int:
    """Mostly near the beginning, where the structure is."""
    return rng.randrange(min(len(body), rng.choice((64, 400, len(body)))) or 1) if body else 0


def _flip(rng: random.Random, body: bytearray) -> None:
    if body:
        body[_place(rng, body)] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, body: bytearray) -> None:
    if body:
        body[_place(rng, body)] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF))


def _length(rng: random.Random, body: bytearray) -> None:
    size = rng.choice((2, 4, 8))
    value = rng.choice((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, rng.getrandbits(64)))
    at = _place(rng, body)
    body[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, rng.choice(("big", "little")))


def _remove(rng: random.Random, body: bytearray) -> None:
    at = _place(rng, body)
    del body[at : at + rng.choice((1, 2, 4, 16, 200))]


def _repeat(rng: random.Random, body: bytearray) -> None:
    at, size = _place(rng, body), rng.choice((1, 4, 12, 64, 500))
    body[at:at] = body[at : at + size] * rng.choice((1, 2, 30))


def _splice(rng: random.Random, body: bytearray) -> None:
    at, other, size = _place(rng, body), _place(rng, body), rng.choice((4, 16, 100))
    body[at : at + size] = body[other : other + size]


def _noise(rng: random.Random, body: bytearray) -> None:
    at = _place(rng, body)
    body[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))


def _truncate(rng: random.Random, body: bytearray) -> None:
    del body[_place(rng, body) :]


_CHANGES: list[tuple[str, Callable[[random.Random, bytearray], None]]] = [
    ("flip", _flip), ("set", _set), ("length", _length), ("remove", _remove), ("repeat", _repeat),
    ("splice", _splice), ("noise", _noise), ("truncate", _truncate),
]  # fmt: skip
