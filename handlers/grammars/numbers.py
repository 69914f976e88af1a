"""Numbers in a JSON schema that llguidance, which keeps them as double precision, would otherwise get wrong."""

from __future__ import annotations

import math
from typing import Any

from engine.guidance import GrammarError

LARGEST_EXACT = 2**53
"""Up to here a double is exact for every whole number."""

LARGEST = 2**63 - 1024
"""The largest double that is a 64-bit number; llguidance knows no greater bounds."""

_LEAST, _MOST = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")


def exact_numbers(schema: dict[str, Any]) -> None:
    """Move bounds that are no doubles inwards to one that is, so that what keeps to them keeps to the schema. Looks at
    this schema alone, not at those inside it. Raises GrammarError for values that cannot be said exactly."""
    for key in _LEAST:
        if _is_large(schema.get(key)):
            schema[key] = _at_least(schema[key])
    for key in _MOST:
        if _is_large(schema.get(key)):
            schema[key] = -_at_least(-schema[key])
    if "const" in schema:
        _check(schema["const"])
    if "enum" in schema:
        _check(schema["enum"])


def _is_large(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_EXACT


def _at_least(bound: int) -> int:
    """The lowest whole double that is not below the bound."""
    if bound > LARGEST:
        raise GrammarError(f"a bound is beyond what can be kept to: {str(bound)[:40]}")
    nearest = float(max(bound, -LARGEST))
    return int(nearest if nearest >= bound else math.nextafter(nearest, math.inf))


def _check(value: object) -> None:
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, int | float) and abs(node) > LARGEST_EXACT:
            raise GrammarError(f"const and enum may hold numbers up to 2^53 only, not {str(node)[:40]}")
        if isinstance(node, dict | list):
            waiting += node.values() if isinstance(node, dict) else node
