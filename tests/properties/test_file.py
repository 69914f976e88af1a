"""serving.properties is read as Java reads it."""

from pathlib import Path

import javaproperties
import pytest
from hypothesis import given
from hypothesis import strategies as st

from properties.configuration import Configuration, ConfigurationError, resolve
from properties.problem import Report
from properties.sources import read_file

PRINTABLE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


def configure(tmp_path: Path, text: str | bytes) -> Configuration:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "serving.properties").write_bytes(text if isinstance(text, bytes) else text.encode())
    return resolve(model=str(tmp_path), environ={})


def test_separators_continuations_and_escapes(tmp_path: Path) -> None:
    found = configure(
        tmp_path,
        "! a comment\n"
        "option.dtype: fp16\n"
        "option.seed   5\n"
        "option.max_model_len\\\n"
        "  =77\n"
        'option.limit_mm_per_prompt = {"image":4, \\\n'
        '      "video":0}\n'
        "option.image_placeholder_token=\\u003cimg\\u003E\\n\n"
        "option.revision=a\\\\b\n",
    )
    settings = found.settings
    assert settings.dtype == "float16"
    assert settings.seed == 5
    assert settings.max_model_len == 77
    assert settings.limit_mm_per_prompt["image"] == 4
    assert settings.image_placeholder_token == "<img>\n"
    assert settings.revision == "a\\b"
    assert found.sources["limit_mm_per_prompt"].location == "serving.properties line 6"
    assert found.sources["image_placeholder_token"].location == "serving.properties line 8"


def test_trailing_spaces_and_windows_line_ends(tmp_path: Path) -> None:
    found = configure(tmp_path, "option.enable_lora=true   \r\noption.max_loras=2\t\r\n")
    assert found.settings.enable_lora is True
    assert found.settings.max_loras == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    found = configure(tmp_path, "option.revision=modèle\n".encode(encoding))
    assert found.settings.revision == "modèle"


def test_later_of_two_lines_counts_with_a_warning(tmp_path: Path) -> None:
    found = configure(tmp_path, "option.seed=1\noption.dtype=fp16\noption.seed=2\n")
    assert found.settings.seed == 2
    assert [str(warning) for warning in found.warnings] == [
        "option.seed is written twice; serving.properties line 3 counts, not serving.properties line 1"
    ]


def test_bad_escape_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"serving.properties line 2: Invalid \\u escape"):
        configure(tmp_path, "option.seed=1\noption.revision=C:\\users\n")


def test_comment_behind_a_value_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="a comment needs a line of its own"):
        configure(tmp_path, "option.dtype=fp16 # half\n")


@given(st.dictionaries(PRINTABLE, PRINTABLE, max_size=5), st.sampled_from([True, False]))
def test_what_java_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, str], ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("java") / "serving.properties"
    path.write_text(javaproperties.dumps(entries, ensure_ascii=ascii_only), "utf-8", newline="")
    report = Report()
    read = {item.key: item.raw for item in read_file(path, report)}
    assert read == {key: value for key, value in entries.items() if value.strip()}
    assert report.problems == []
