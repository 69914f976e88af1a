"""docs/compatibility.md names tests: each of them must be there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_test_that_the_document_names_is_there() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text()
    named = {part for both in re.findall(r"`(test_[\w*.]+)(?:::(test_\w+))?`", text) for part in both if part}
    assert len(named) > 20
    files = list((ROOT / "tests").rglob("test_*.py"))
    functions = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    missing = {
        name
        for name in named
        if name not in functions and not any((ROOT / "tests").rglob(name if name.endswith(".py") else "\0"))
    }
    assert not missing
