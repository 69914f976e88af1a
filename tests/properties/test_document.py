"""The example file and the documentation page come from the schema."""

from pathlib import Path

import pytest

from properties import document
from properties.configuration import resolve
from properties.lmi import IGNORED, TRUE_MEANS
from properties.names import KEYS
from properties.settings import Settings, options


def test_generated_files_are_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    assert document.main(["--check"]) == 0, capsys.readouterr().err


def test_stale_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    assert document.main(["--check"], tmp_path) == 1
    assert document.main([], tmp_path) == 0
    assert document.main(["--check"], tmp_path) == 0
    with (tmp_path / "serving.properties.example").open("a") as file:
        file.write("#\n")
    assert document.main(["--check"], tmp_path) == 1


def test_every_option_and_every_name_is_documented() -> None:
    page, example = document.page(), document.example()
    for name, _, facts in options():
        key = name if facts.server else f"option.{name}"
        assert f"| `{key}` |" in page
        assert f"\n#{key}=" in example
        for variable in facts.variables:
            assert f"`{variable.name}`" in page
    for key in (*KEYS, *IGNORED):
        assert f"`{key}`" in page


def test_the_example_states_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    lines = (line.removeprefix("#") for line in document.example().splitlines() if line.startswith("#"))
    settings = [line for line in lines if "=" in line and not line.startswith((" ", "#"))]
    (tmp_path / "serving.properties").write_text("\n".join(settings))
    found = resolve(model=str(tmp_path), environ={"SERVING_STRICT_OPTIONS": "true"})
    assert found.warnings == []
    assert len(settings) == len(Settings.model_fields)
    expected = Settings().model_copy(update={"model_id": str(tmp_path)})
    assert found.settings == expected


def test_no_name_has_two_meanings() -> None:
    spellings = [
        f"{'' if facts.server else 'option.'}{name}"
        for attribute, _, facts in options()
        for name in (attribute, *facts.aliases)
    ]
    assert len(spellings) == len(set(spellings))
    assert not set(spellings) & (set(IGNORED) | set(TRUE_MEANS))
