"""Where a model's chat templates are found, and which one a request gets: as transformers, and then vLLM, have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from engine.errors import ModelLoadError
from handlers.backends.rolling.model_front import ModelFront
from handlers.errors import InvalidRequest
from handlers.prompts.chat_templates import ChatTemplates, read_chat_templates
from handlers.prompts.renderer import PromptRenderer
from handlers.request import ChatPrompt, Message, TextPart
from properties.settings import Settings
from tests.support.models import make_text_model
from tests.support.tokenizers import byte_level, wrapped

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
NAMED = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]

FILES: dict[str, st.SearchStrategy[Any]] = {
    "tokenizer_config.json": st.sampled_from(
        [None, "token", {"default": "token d", "rag": "token r"}, [*NAMED, {"name": "rag", "template": "r"}]]
    ),
    "chat_template.jinja": st.sampled_from([None, "jinja"]),
    "additional_chat_templates/tool_use.jinja": st.sampled_from([None, "more t"]),
    "additional_chat_templates/rag.jinja": st.sampled_from([None, "more r"]),
    "chat_template.json": st.sampled_from([None, "legacy"]),
    "processor_config.json": st.sampled_from([None, "processor"]),
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and an image processor without a template."""
    path = tmp_path_factory.mktemp("bare")
    wrapped(byte_level()).save_pretrained(path)
    CLIPImageProcessorPil().save_pretrained(path)
    return path


def write(path: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(exist_ok=True)
        if name == "tokenizer_config.json":
            config = json.loads(file.read_text()) if file.is_file() else {}
            config.pop("chat_template", None)
            file.write_text(json.dumps(config | ({} if content is None else {"chat_template": content})))
        elif content is None:
            file.unlink(missing_ok=True)
        else:
            file.write_text(content if name.endswith("jinja") else json.dumps({"chat_template": content}))
    return path


def outcome(made: Any) -> Any:
    try:
        return made()
    except ValueError:
        return None


@settings(max_examples=80, deadline=None)
@given(files=st.fixed_dictionaries(FILES))
def test_they_are_found_where_transformers_finds_them(bare: Path, files: dict[str, Any]) -> None:
    path = write(bare, files)
    found = read_chat_templates(None, path)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path)
    for tools in (None, [TOOL]):
        theirs = outcome(lambda tools=tools: tokenizer.get_chat_template(tools=tools))
        if tools is None:
            # vLLM's order: what the processor has, where it chooses by itself, then what the tokenizer has.
            kept = outcome(lambda: LlavaProcessor.from_pretrained(path, use_fast=False).chat_template)
            kept = kept.get("default") if isinstance(kept, dict) else kept
            theirs = theirs if kept is None else kept
            if files["chat_template.json"]:  # Also where transformers refuses it beside the newer files.
                theirs = files["processor_config.json"] or "legacy"
        if theirs is not None:
            assert found.chosen(None, tools is not None) == theirs
    for name in tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ():
        if name != "default":
            assert found.chosen(name, False) == tokenizer.get_chat_template(name)


def test_tools_get_the_template_for_them_and_a_name_any(bare: Path) -> None:
    named = [{"name": n, "template": f"{n}{{{{ tools is defined }}}}"} for n in ("default", "tool_use", "rag")]
    empty: dict[str, Any] = dict.fromkeys(FILES)
    path = write(bare, {**empty, "tokenizer_config.json": named})
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path)
    renderer = PromptRenderer(tokenizer, read_chat_templates(None, path, tokenizer.chat_template))

    def rendered(template: str | None = None, tools: Any = None) -> str:
        said = Message("user", [TextPart("hi")])
        return renderer.render(ChatPrompt([said], template=template, tools=tools)).text

    assert rendered().startswith("default")
    assert rendered(tools=[TOOL]).startswith("tool_use")
    assert rendered("rag", [TOOL]).startswith("rag")
    assert rendered("tool_use").startswith("tool_use")
    assert rendered("another one: {{ messages[0].role }}") == "another one: user"
    assert renderer.templates.described() == (
        "default of tokenizer_config.json; with tools tool_use of tokenizer_config.json"
    )


def test_an_operator_may_choose_by_name_or_bring_another(bare: Path) -> None:
    path = write(bare, {**dict.fromkeys(FILES), "tokenizer_config.json": NAMED})
    for setting, want, told in (
        ("tool_use", "t", "tool_use of tokenizer_config.json"),
        ("{{ 1 }}", "{{ 1 }}", "option.chat_template"),
        ("own.txt", "of the operator's", "option.chat_template"),
    ):
        (path / "own.txt").write_text("of the operator's")
        found = read_chat_templates(setting, path)
        assert (found.chosen(None, False), found.chosen(None, True), found.described()) == (want, want, told)
    assert set(read_chat_templates("{{ 1 }}", path).named) == {"default"}
    with pytest.raises(ModelLoadError, match=r"'tool-use' is neither .* \(the model has default, tool_use\)"):
        read_chat_templates("tool-use", path)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ([{"name": "default"}], "neither a text nor a list"),
        (5, "neither a text"),
        ({"default": None}, "neither"),
    ],
)
def test_an_entry_that_is_no_template_is_told(tmp_path: Path, entry: Any, says: str) -> None:
    write(tmp_path, {"tokenizer_config.json": entry})
    with pytest.raises(ModelLoadError, match=f"tokenizer_config.json is {says}"):
        read_chat_templates(None, tmp_path)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelLoadError, match=r"chat_template\.jinja of the model cannot be read"):
        read_chat_templates(None, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for text, reason in (
        ("{", "line 1 column 2"),
        ("[]", "it holds no JSON object"),
        ("[" * 100_000, "it is nested too deeply"),
        (b"\xff\xff", "codec can't decode"),
    ):
        (tmp_path / "chat_template.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ModelLoadError, match=r"chat_template\.json of the model cannot be read: .") as caught:
            read_chat_templates(None, tmp_path)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


def test_numbers_that_strict_json_lacks_are_read_as_by_transformers(tmp_path: Path) -> None:
    numbers = '"model_max_length": Infinity, "a": -Infinity, "b": NaN, "c": 1e999'
    (tmp_path / "tokenizer_config.json").write_text(f'{{"chat_template": "t", {numbers}}}')
    assert read_chat_templates(None, tmp_path).chosen(None, False) == "t"


def test_what_only_the_tokenizer_knows_is_used(tmp_path: Path) -> None:
    found = read_chat_templates(None, tmp_path, {"default": "d", "tool_use": "t"})
    assert (found.chosen(None, False), found.chosen(None, True)) == ("d", "t")
    assert read_chat_templates(None, tmp_path).chosen(None, False) is None
    assert ChatTemplates().described() == "none"


def test_several_templates_without_a_default_are_named(bare: Path) -> None:
    path = write(bare, {**dict.fromkeys(FILES), "additional_chat_templates/rag.jinja": "r"})
    renderer = PromptRenderer(PreTrainedTokenizerFast.from_pretrained(path), read_chat_templates(None, path))
    with pytest.raises(InvalidRequest, match=r"name one in chat_template \(rag\)") as caught:
        renderer.render(ChatPrompt([Message("user", [TextPart("hi")])]))
    assert caught.value.param == "chat_template"


def test_an_error_in_any_of_them_is_told_with_its_name() -> None:
    templates = read_chat_templates(None, Path("/nowhere"), {"default": "d", "rag": "{% if %}"})
    with pytest.raises(ValueError, match="the chat template 'rag' has an error in line 1"):
        PromptRenderer(wrapped(byte_level()), templates)


def test_a_served_model_has_all_its_templates(tmp_path: Path) -> None:
    path = make_text_model(tmp_path)
    (path / "chat_template.jinja").unlink()
    write(path, {"tokenizer_config.json": [{"name": n, "template": n} for n in ("default", "tool_use", "rag")]})
    templates = ModelFront.load(Settings(), str(path)).text.renderer.templates
    assert (templates.chosen(None, False), templates.chosen(None, True)) == ("default", "tool_use")
    assert templates.named.keys() == {"default", "tool_use", "rag"}
    with pytest.raises(ModelLoadError, match="the model has default, rag, tool_use"):
        ModelFront.load(Settings(chat_template="tools"), str(path))
