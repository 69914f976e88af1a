"""What the page's routes answer to any client; `tests/page` asks them with a browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from container import page
from handlers.backends.select import Choice
from handlers.errors import NotFound
from properties.configuration import resolve
from tests.support.shapes import ROOT


def model_page(directory: Path, examples: str) -> page.ModelPage:
    (directory / "config.json").write_text("{}")
    (directory / "examples.json").write_text(examples)
    (directory / "circle.png").write_bytes(b"an image")
    return page.ModelPage(resolve(model=str(directory), environ={}), directory, Choice("rolling", "it is installed"))


def test_an_example_is_found_by_its_number_alone(tmp_path: Path) -> None:
    shown = model_page(tmp_path, json.dumps([{"question": "What?", "image": "circle.png"}]))
    reply = shown.example("0")
    assert (reply.body, reply.content_type) == (b"an image", "image/png")
    for number in ("1", "-1", "00", "", "x", "../0", "9" * 5000):
        with pytest.raises(NotFound):
            shown.example(number)


def test_examples_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    """A model may come from anywhere: its list must neither stop the start nor show other files."""
    (tmp_path.parent / "outside.png").write_bytes(b"secret")
    images = ["../outside.png", "a\0.png", "x" * 400 + ".png", "none.png", "config.json", "circle.png"]
    shown = model_page(tmp_path, json.dumps([{"question": "What?", "image": image} for image in images]))
    assert shown.example("0").body == b"an image"
    with pytest.raises(NotFound):
        shown.example("1")


@pytest.mark.parametrize("examples", ["", "{}", "[1]", "[" * 100_000])
def test_a_list_of_examples_that_is_none_is_like_no_list(tmp_path: Path, examples: str) -> None:
    with pytest.raises(NotFound):
        model_page(tmp_path, examples).example("0")


@pytest.mark.parametrize(
    "name", ["__init__.py", "../app.py", "", "examples.json", "docs/../README.md", "docs/page-try.png", "deploy.md"]
)
def test_only_the_files_of_the_page_are_shown(name: str) -> None:
    with pytest.raises(NotFound):
        page.file(name)


def test_the_documentation_is_there() -> None:
    reply = page.file("docs/configuration.md")
    assert reply.content_type == "text/plain; charset=utf-8"
    assert reply.body == (ROOT / "docs" / "configuration.md").read_bytes()


def test_where_the_model_lies_is_not_shown(tmp_path: Path) -> None:
    shown = model_page(tmp_path, "[]")
    options = {option["name"]: option["value"] for option in shown.options()}
    assert options["option.model_id"] == tmp_path.name
