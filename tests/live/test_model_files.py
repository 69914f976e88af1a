"""A served model does what its own files say of templates and defaults, and its conversations go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.live import LiveServer
from tests.support.shapes import SHAPES
from tests.support.tools import tool

NOW = tool("now", {"type": "object", "properties": {"zone": {"type": "string"}}})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Shapes with its template as the first of three, as Command-R has them, and a default length."""
    model = tmp_path_factory.mktemp("models") / "shapes"
    shutil.copytree(SHAPES, model, ignore=shutil.ignore_patterns("*.py", "pictures", "__pycache__"))
    own = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    calls = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments.items() | list }}{% endfor %}"
        "{{ m.content if m.content is string else m.content[0].text }};{% endfor %}"
    )
    names = {"default": own, "tool_use": calls, "rag": "rag:" + own}
    config["chat_template"] = [{"name": name, "template": text} for name, text in names.items()]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    defaults = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**defaults, "max_new_tokens": 3}))
    with LiveServer(model, "tool_call_parser=hermes", "enable_auto_tool_choice=true") as live:
        yield live


def chat(server: LiveServer, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    body = {"messages": messages, "return_prompt_text": True, "ignore_eos": True, **fields}
    reply = server.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def test_named_templates_and_the_models_length(server: LiveServer) -> None:
    said = [{"role": "user", "content": "how many shapes?"}]
    plain, rag = chat(server, said), chat(server, said, chat_template="rag")
    assert "how many shapes?" in plain["prompt_text"]
    assert rag["prompt_text"] == "rag:" + plain["prompt_text"]
    assert chat(server, said, tools=[NOW])["prompt_text"] == "how many shapes?;"
    assert chat(server, said, tools=[NOW], chat_template="default")["prompt_text"] == plain["prompt_text"]
    refused = server.http.post("/v1/chat/completions", json={"messages": said, "chat_template": "rga"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template")
    assert "default, rag, tool_use" in refused.json()["error"]["message"]
    assert plain["usage"]["completion_tokens"] == 3
    assert chat(server, said, max_tokens=5)["usage"]["completion_tokens"] == 5
    assert "chat template: default of tokenizer_config.json; with tools tool_use" in server.log


def test_a_call_that_was_cut_does_not_end_the_conversation(server: LiveServer) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"zone":'}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "how many shapes?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {
            "role": "tool",
            "tool_call_id": "c",
            "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "on"}],
        },
        {"role": "assistant", "content": None, "reasoning": "Hm"},
    ]
    assert chat(server, messages, tools=[NOW])["prompt_text"] == "how many shapes?;[];no\non;;"
    forced = chat(server, messages, tools=[NOW], tool_choice="required", max_tokens=2)
    (choice,) = forced["choices"]
    assert choice["finish_reason"] == "length"
    assert chat(server, [*messages, choice["message"]], tools=[NOW])["prompt_text"].startswith("how many shapes?;")
