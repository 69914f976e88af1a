"""What a JSON body may hold, counted before it is parsed.

Parsing is one call of C code that no other thread interrupts, so what it may cost is bounded before it begins. The
count goes through the body in slices, with numpy, which lets other threads run. It does not check that the body is
JSON: up to the first byte that is none, it counts what a parser would find.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from handlers.errors import MalformedBody

SLICE_BYTES = 2**18
"""Looked at in one step."""

MOST_ESCAPES = 2**20
"""Backslashes. A picture of 20 MB has 440,000 where its slashes are escaped, as PHP does."""

MOST_WIDE_BYTES = 12 * 2**20
"""Of texts with characters beyond ASCII, or escapes for them: each of their characters may take 4 bytes of memory."""

MOST_ESCAPED_BYTES = 2**25
"""Of texts with a backslash: they are copied twice, a picture of 20 MB among them."""

MOST_BYTES_OUTSIDE = 2**24
"""Outside of texts: numbers and white space."""

MOST_CONTAINERS = 2**16
"""Lists and objects: messages, and parts of their content, by far the most of them."""

MOST_KEYS = 2**17
"""Of all objects together."""

_FEWEST_VALUES, _MOST_VALUES = 2**19, 2**20

_WIDE, _ESCAPED = 1, 2
_SHIFTS = tuple(np.uint64(1 << n) for n in range(6))
_LAST_BIT = np.uint64(63)
_NONE = np.uint64(0)


@dataclass(slots=True)
class BodyCount:
    """values: at least as many as the body has, keys not counted. containers: lists and objects. outside: bytes that
    are in no text. wide, escaped: bytes of texts beyond ASCII, and of texts with escapes; of short ones, those between
    them as well."""

    values: int = 1
    keys: int = 0
    containers: int = 0
    escapes: int = 0
    outside: int = 0
    wide: int = 0
    escaped: int = 0

    def add_text(self, size: int, flags: int) -> None:
        """flags: see `_flags`."""
        self.wide += size if flags & _WIDE else 0
        self.escaped += size if flags & _ESCAPED else 0


def check_body(body: bytes, context: int) -> None:
    """Raises MalformedBody for more of anything than a request could use, as soon as it is found.

    context: tokens that the model takes, 0 where that is not known. A value may be a token id, and several prompts may
    come in one body.
    """
    values = min(_MOST_VALUES, max(_FEWEST_VALUES, 4 * context))
    for count in counted(body):
        for found, allowed, what in (
            (count.values, values, "values (items of lists and objects)"),
            (count.containers, MOST_CONTAINERS, "lists and objects"),
            (count.keys, MOST_KEYS, "keys"),
            (count.escapes, MOST_ESCAPES, "escapes (backslashes)"),
            (count.wide, MOST_WIDE_BYTES, "bytes in texts that hold more than ASCII"),
            (count.escaped, MOST_ESCAPED_BYTES, "bytes in texts that hold escapes (backslashes)"),
            (count.outside, MOST_BYTES_OUTSIDE, "bytes outside of texts (numbers and white space)"),
        ):
            if found > allowed:
                raise MalformedBody(f"the body has {found} {what} or more; allowed: at most {allowed}")


def counted(body: bytes) -> Iterator[BodyCount]:
    """The count after each slice: one object, which grows. Takes memory for one slice."""
    count = BodyCount()
    inside = skips = False  # in a text; behind a backslash that the slice before ended with
    opened, flags = 0, 0  # where the text began, and of what was seen of it
    for at in range(0, len(body), SLICE_BYTES):
        piece = body[at : at + SLICE_BYTES]
        if skips or b"\\" in piece:
            piece, escapes, skips = _without_escapes(piece, skips)
            count.escapes += escapes
        first, last = piece.find(b'"'), piece.rfind(b'"')
        if inside and first < 0:
            flags |= _flags(piece)
        else:
            if inside:
                count.add_text(at + first - opened, flags | _flags(piece[:first]))
            count.add_text(last - first, _flags(piece[first:last]))
            inside = _count_outside(piece, inside, count)
            if inside:
                opened, flags = at + last + 1, _flags(piece[last + 1 :])
        yield count


def _without_escapes(piece: bytes, skips: bool) -> tuple[bytes, int, bool]:
    """The piece with another letter for each backslash and quote that is escaped; how many backslashes it had; and
    whether it ends with one that escapes what follows. skips: its first byte is escaped."""
    escapes = piece.count(b"\\")
    if skips:
        piece = b"_" + piece[1:]
    ends = (len(piece) - len(piece.rstrip(b"\\"))) % 2 == 1
    return piece.replace(b"\\\\", b"\\_").replace(b'\\"', b"\\_"), escapes, ends


def _flags(piece: bytes) -> int:
    """What a text holds of which this is a piece, from `_without_escapes`."""
    if b"\\" not in piece:
        return 0 if piece.isascii() else _WIDE
    return _ESCAPED if piece.isascii() and b"\\u" not in piece else _ESCAPED | _WIDE


def _count_outside(piece: bytes, inside: bool, count: BodyCount) -> bool:
    """Add what the piece has outside of texts. inside: it begins in a text. Returns whether it ends in one."""
    letters = np.frombuffer(piece + b" " * (-len(piece) % 64), np.uint8)
    within = _bits(letters, b'"')
    for shift in _SHIFTS:
        within ^= (
            within << shift
        )  # now a bit says whether the quotes up to it are odd, counted from its word's first
    odd = np.bitwise_xor.accumulate(within >> _LAST_BIT)
    before = np.concatenate((odd[:1] & _NONE, odd[:-1]))
    if inside:
        before ^= np.uint64(1)
    within ^= _NONE - before  # all bits of a word that begins in a text
    outside = ~within

    def found(letter: bytes) -> int:
        return int(np.bitwise_count(_bits(letters, letter) & outside).sum())

    containers = found(b"[") + found(b"{")
    count.containers += containers
    count.values += containers + found(b",")
    count.keys += found(b":")
    count.outside += int(np.bitwise_count(outside).sum())
    return bool(within[-1] >> _LAST_BIT)


def _bits(letters: npt.NDArray[np.uint8], letter: bytes) -> npt.NDArray[np.uint64]:
    """A bit for each letter, the first in the lowest."""
    return np.packbits(letters == letter[0], bitorder="little").view(np.dtype("<u8"))
