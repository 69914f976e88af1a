"""Which directories beside a model are adapters, without vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from handlers.backends.adapters import AdapterFiles
from handlers.errors import InvalidConfiguration


def make(home: Path, name: str, *files: str) -> None:
    path = home / "adapters" / name
    path.mkdir(parents=True)
    for file in files:
        (path / file).write_text("{}")


def test_adapters_are_the_directories_beside_the_model(tmp_path: Path) -> None:
    assert AdapterFiles(tmp_path).at_start() == {}
    for name in ("poet", "cook.v2"):
        make(tmp_path, name, "adapter_config.json")
    make(tmp_path, ".cache")
    (tmp_path / "adapters" / "README.md").write_text("")
    place = tmp_path / "adapters"
    assert AdapterFiles(tmp_path).at_start() == {"cook.v2": place / "cook.v2", "poet": place / "poet"}


@pytest.mark.parametrize(("name", "files"), [("a b", ["adapter_config.json"]), ("poet", ["config.json"])])
def test_what_is_no_adapter_is_told(tmp_path: Path, name: str, files: list[str]) -> None:
    make(tmp_path, name, *files)
    with pytest.raises(InvalidConfiguration, match=f"adapters/{name}"):
        AdapterFiles(tmp_path).at_start()


def test_code_of_an_adapters_own_is_not_used_and_that_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "poet", "adapter_config.json", "model.py")
    assert set(AdapterFiles(tmp_path).at_start()) == {"poet"}
    assert "adapters/poet/model.py is not used" in caplog.text
