"""Every row of tests/evidence.md names the tests that show it; docs/compatibility.md is short; links lead somewhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
EVIDENCE = TESTS / "evidence.md"
PAGE = ROOT / "docs" / "compatibility.md"
PAGES = [EVIDENCE, ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_NAMED = re.compile(r"(?P<file>(?:\w+/)*test_\w+\.py)(?:::(?P<name>test_\w+))?")
_QUOTED = re.compile(r"`([^`]+)`")
_BARE = re.compile(r"`test_\w+`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def rows() -> Iterator[tuple[int, list[str], bool]]:
    """Line number, cells, and whether it is a table's first row."""
    header = True
    for number, line in enumerate(EVIDENCE.read_text().splitlines(), start=1):
        if not line.startswith("|"):
            header = True
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if not set(line) <= set("|-: "):
            yield number, cells, header
        header = False


@cache
def defined(file: str) -> set[str]:
    """Names of a file's tests."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(ast.parse((TESTS / file).read_text())) if isinstance(node, kinds)}


def wrong_with(named: str) -> str | None:
    """What is wrong with the name of a test, `test_file.py::test_name`, or of a file of tests."""
    match = _NAMED.fullmatch(named)
    if match is None:
        return f"{named} is no test's name"
    file, name = match["file"], match["name"]
    if not (TESTS / file).is_file():
        return f"there is no tests/{file}"
    if name is not None and name not in defined(file):
        return f"tests/{file} has no {name}"
    return None


def test_every_table_has_a_column_for_tests() -> None:
    columns = 0
    for number, cells, header in rows():
        if header:
            assert cells[-1] == "test", f"line {number}: the last column of a table is headed `test`"
            columns = len(cells)
        assert len(cells) == columns, f"line {number} has {len(cells)} cells (`|` is written `\\|` in a cell)"


def test_every_row_names_a_test_that_exists() -> None:
    wrong: list[str] = []
    seen = 0
    for number, cells, header in rows():
        if header:
            continue
        seen += 1
        named = _QUOTED.findall(cells[-1])
        if not named:
            wrong.append(f"line {number} names no test: {cells[0][:60]}")
        wrong += [f"line {number}: {problem}" for problem in map(wrong_with, named) if problem]
    assert seen > 200
    if wrong:
        pytest.fail("\n".join(wrong))


def test_what_stands_outside_of_tables_exists_too() -> None:
    text = EVIDENCE.read_text()
    assert not _BARE.findall(text), "a test is named with its file"
    wrong = [wrong_with(match[0]) for match in _NAMED.finditer(text)]
    assert not any(wrong), [problem for problem in wrong if problem]


def test_the_page_for_users_is_short_and_shows_where_the_evidence_is() -> None:
    text = PAGE.read_text()
    assert len(text.encode()) <= 15_000
    assert "](../tests/evidence.md)" in text
    assert not _NAMED.search(text), "tests are named in tests/evidence.md"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub writes them."""
    headings = re.findall(
        r"^#+ (.+)$",
        re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL),
        re.MULTILINE,
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    wrong: list[str] = []
    for link in _LINK.findall(_CODE.sub("", page.read_text())):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists():
            wrong.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target):
            wrong.append(f"{link}: no such heading")
    assert wrong == []
