"""AV1: how large the frames in coded data are (AV1 bitstream specification, sections 5.3 to 5.5)."""

from __future__ import annotations

from collections.abc import Iterator

_SEQUENCE_HEADER, _FRAME_HEADER, _FRAME = 1, 3, 6


def frames(data: memoryview, parts: Iterator[None]) -> tuple[int, int]:
    """(pixels of the largest frame that the headers allow, number of frames). parts: counts the units.

    Raises IndexError or ValueError for data that is cut short.
    """
    at = largest = number = 0
    for _ in parts:
        if at >= len(data):
            break
        header = data[at]
        kind, at = header >> 3 & 15, at + (2 if header & 4 else 1)
        size = len(data) - at
        if header & 2:
            size, at = _leb128(data, at)
        unit = data[at : at + size]
        at += size
        if kind == _SEQUENCE_HEADER:
            largest = max(largest, _frame_pixels(bytes(unit[:512])))
        number += kind in (_FRAME_HEADER, _FRAME)
    return largest, number


def _leb128(data: memoryview, at: int) -> tuple[int, int]:
    """(number, where it ends)."""
    value = 0
    for i in range(8):
        value |= (data[at + i] & 127) << 7 * i
        if not data[at + i] & 128:
            return value, at + i + 1
    raise ValueError("a length of more than eight bytes")


class _Bits:
    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def read(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise ValueError("the sequence header is cut short")
        return self._value >> self._left & (1 << count) - 1

    def skip_variable_length(self) -> None:
        zeros = 0
        while not self.read(1):
            zeros += 1
        if zeros < 32:
            self.read(zeros)


def _frame_pixels(header: bytes) -> int:
    """The largest frame's width times its height."""
    bits = _Bits(header)
    bits.read(3 + 1)  # profile, still picture
    if bits.read(1):  # reduced header
        bits.read(5)
    else:
        _skip_operating_points(bits)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    return (bits.read(width_bits) + 1) * (bits.read(height_bits) + 1)


def _skip_operating_points(bits: _Bits) -> None:
    delay_bits = 0
    if bits.read(1):  # timing
        bits.read(32 + 32)
        if bits.read(1):
            bits.skip_variable_length()
        if bits.read(1):  # decoder model
            delay_bits = bits.read(5) + 1
            bits.read(32 + 5 + 5)
    display_delay = bits.read(1)
    for _ in range(bits.read(5) + 1):
        bits.read(12)
        if bits.read(5) > 7:
            bits.read(1)
        if delay_bits and bits.read(1):
            bits.read(2 * delay_bits + 1)
        if display_delay and bits.read(1):
            bits.read(4)
