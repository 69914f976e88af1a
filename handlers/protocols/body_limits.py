"""Bounds what JSON from clients may hold: a body before it is parsed, and how deeply a value in it is nested.

Parsing is one call of C code that no other thread interrupts, so what it may cost is bounded before it begins. The
count goes through the body in slices, with numpy, which lets other threads run. It does not check that the body is
JSON: up to the first byte that is not, it counts what a parser would find.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from handlers.errors import MalformedBody

SLICE_BYTES = 2**18
"""The bytes examined in one step."""

MOST_TEXT_BYTES = 2**25
"""Most bytes of one text: more than any model's context, and an image of 24 MB in base64. The parser creates a text in
one call that lets no other thread run: a longer one would block them for more than 50 ms on a slow machine."""

MOST_WIDE_BYTES = 12 * 2**20
"""Most bytes in texts with characters beyond ASCII, or escapes for them: each character may take 4 bytes of memory."""

MOST_ESCAPED_BYTES = 2**25
"""Most bytes in texts with an escape, which are copied twice: enough for an image of 20 MB with line breaks in it."""

MOST_BYTES_OUTSIDE = 2**24
"""Most bytes outside of texts: numbers and white space."""

MOST_CONTAINERS = 2**16
"""Most lists and objects; nearly all of them are messages and parts of their content."""

MOST_KEYS = 2**17
"""Most keys of all objects together."""

MAX_DEPTH = 100
"""Most levels of lists and objects in a schema, a function or the arguments of a call."""

_FEWEST_VALUES, _MOST_VALUES = 2**19, 2**20
_FEWEST_ESCAPES, _MOST_ESCAPES = 2**20, 2**22

_WIDE, _ESCAPED = 1, 2
_SHIFTS = tuple(np.uint64(1 << n) for n in range(6))
_LAST_BIT = np.uint64(63)
_NONE = np.uint64(0)


@dataclass(slots=True)
class BodyCount:
    r"""What a body holds, as far as it has been counted.

    Attributes:
        values: Items of lists and objects, or more: the count is never too low.
        escapes: Backslashes, except those of `slashes`.
        slashes: `\/`, as some clients write every slash, also in images; replaced before the body is parsed.
        outside: Bytes outside of texts.
        wide: Bytes of texts beyond ASCII; of short texts, the bytes between them are counted, too.
        escaped: Bytes of texts with `escapes`, likewise.
        longest: Bytes of the longest text; several short texts may count as one.
    """

    values: int = 1
    keys: int = 0
    containers: int = 0
    escapes: int = 0
    slashes: int = 0
    outside: int = 0
    wide: int = 0
    escaped: int = 0
    longest: int = 0

    def add_text(self, size: int, flags: int) -> None:
        """flags: see `_flags`."""
        self.longest = max(self.longest, size)
        self.wide += size if flags & _WIDE else 0
        self.escaped += size if flags & _ESCAPED else 0


def check_body(body: bytes, context: int, longest_text: int = MOST_TEXT_BYTES) -> BodyCount:
    """Count what the body contains, and refuse it if that is too much.

    A value may be a token id, several prompts may be in one body, and a client may write each character of a prompt
    as an escape: so the limits grow with the context, which is in tokens, 0 if not known. longest_text: in bytes.

    Raises:
        MalformedBody: There is more of anything than a request could use; raised as soon as it is found.
    """
    count = BodyCount()
    values = min(_MOST_VALUES, max(_FEWEST_VALUES, 4 * context))
    escapes = min(_MOST_ESCAPES, max(_FEWEST_ESCAPES, 4 * context))
    for count in counted(body):
        for found, allowed, what in (
            (count.values, values, "values (items of lists and objects)"),
            (count.containers, MOST_CONTAINERS, "lists and objects"),
            (count.keys, MOST_KEYS, "keys"),
            (count.escapes, escapes, "escapes (backslashes)"),
            (count.longest, longest_text, "bytes in one text"),
            (count.wide, MOST_WIDE_BYTES, "bytes in texts that hold more than ASCII"),
            (count.escaped, MOST_ESCAPED_BYTES, "bytes in texts that hold escapes (backslashes)"),
            (count.outside, MOST_BYTES_OUTSIDE, "bytes outside of texts (numbers and white space)"),
        ):
            if found > allowed:
                raise MalformedBody(f"the body has {found} {what} or more; allowed: at most {allowed}")
    return count


def depth(value: object) -> int:
    """Return how deeply lists and objects are nested, counted up to one level beyond the limit."""
    level, deep = [value], 0
    while deep <= MAX_DEPTH:
        nodes = [node for node in level if isinstance(node, dict | list)]
        if not nodes:
            return deep
        level = [inner for node in nodes for inner in (node.values() if isinstance(node, dict) else node)]
        deep += 1
    return deep


def with_plain_slashes(body: bytes, slice_bytes: int = SLICE_BYTES) -> memoryview:
    r"""Return the body with `/` for each `\/`, which means the same inside JSON's texts and is an error outside."""
    plain, size = np.empty(len(body), np.uint8), 0
    for _, piece in _slices(body, slice_bytes):
        short = b"\\\\".join(part.replace(b"\\/", b"/") for part in piece.split(b"\\\\"))
        plain[size : size + len(short)] = np.frombuffer(short, np.uint8)
        size += len(short)
    return plain[:size].data


def counted(body: bytes, slice_bytes: int = SLICE_BYTES) -> Iterator[BodyCount]:
    """Yield the count after each slice: always the same object, which grows. Takes memory for one slice."""
    count = BodyCount()
    inside = False  # in a text
    opened, flags = 0, 0  # where the text began, and of what was seen of it
    for at, piece in _slices(body, slice_bytes):
        if b"\\" in piece:
            piece, escapes, slashes = _without_escapes(piece)
            count.escapes += escapes
            count.slashes += slashes
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
        if inside:
            count.longest = max(count.longest, at + len(piece) - opened)
        yield count


def _slices(body: bytes, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield the start of each slice, and the slice. None ends between a backslash and what it escapes."""
    at = 0
    while at < len(body):
        piece = body[at : at + size]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2 == 1:
            piece = body[at : at + size + 1]
        yield at, piece
        at += len(piece)


def _without_escapes(piece: bytes) -> tuple[bytes, int, int]:
    r"""Replace each escaped backslash and quote, and `\/`, by other letters.

    Returns:
        The slice without them, how many backslashes it had apart from those of `\/`, and the number of `\/`.
    """
    backslashes = piece.count(b"\\")
    piece = piece.replace(b"\\\\", b"\\_").replace(b'\\"', b"\\_")
    slashes = piece.count(b"\\/")
    if slashes:
        piece = piece.replace(b"\\/", b"//")
    return piece, backslashes - slashes, slashes


def _flags(piece: bytes) -> int:
    """Return `_WIDE` and `_ESCAPED` as they hold for a piece of a text that `_without_escapes` returned."""
    if b"\\" not in piece:
        return 0 if piece.isascii() else _WIDE
    return _ESCAPED if piece.isascii() and b"\\u" not in piece else _ESCAPED | _WIDE


def _count_outside(piece: bytes, inside: bool, count: BodyCount) -> bool:
    """Add what the piece contains outside of texts, and return whether it ends in a text."""
    letters = np.frombuffer(piece + b" " * (-len(piece) % 64), np.uint8)
    within = _bits(letters, b'"')
    for shift in _SHIFTS:
        within ^= within << shift  # now a bit says whether the quotes up to it are odd, counted from its word's first
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
    """Return a bit for each letter, the first in the lowest."""
    return np.packbits(letters == letter[0], bitorder="little").view(np.dtype("<u8"))
