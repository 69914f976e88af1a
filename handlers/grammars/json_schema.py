"""Finds the schemas inside a JSON schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose value holds schemas under names chosen by the user."""

_VALUES = ("enum", "const", "default", "examples")
"""Keywords whose value is never a schema, even if it looks like one."""


def subschemas(schema: object) -> Iterator[dict[str, Any]]:
    """Yield the schema and all schemas inside it that are objects. They may be changed during the iteration."""
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        if not isinstance(node, dict):
            continue
        yield node
        for key, value in node.items():
            if key in _BY_NAME and isinstance(value, dict):
                waiting += value.values()
            elif key not in _VALUES:
                waiting.append(value)
