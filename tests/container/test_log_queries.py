"""The queries for CloudWatch Logs Insights in docs/deploy.md, held to what the server logs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx

from tests.support.scripted_server import ServerProcess
from tests.support.shapes import ROOT

_WORDS = {"filter", "stats", "sort", "count", "pct", "sum", "as", "by", "bin", "and", "desc", "fields"}


def fields(query: str) -> set[str]:
    """The names in a query that must be fields of the log: not words of the language, texts, numbers or new names."""
    query = re.sub(r'"[^"]*"', "", query)
    new = set(re.findall(r"\bas (\w+)", query))
    return {word for word in re.findall(r"\b[a-z_]\w*", re.sub(r"bin\(\w+\)", "", query)) if word not in _WORDS | new}


def test_the_fields_of_the_queries_are_logged(tmp_path: Path) -> None:
    queries = re.findall(r"```insights\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    assert len(queries) == 2
    with ServerProcess(tmp_path / "m", SERVING_LOG_FORMAT="json") as container:
        server = container.ready()
        for tokens in (3, 0):
            body = {"inputs": "{}", "parameters": {"max_new_tokens": tokens}}
            httpx.post(f"{server.url}/invocations", json=body, timeout=60)
        lines = [json.loads(container.wait_for(rf'"message": "request".*"status": {status}')) for status in (200, 400)]
    for query, line in zip(queries, lines, strict=True):
        assert fields(query) <= line.keys(), query
        for name, value in re.findall(r'(\w+) = "([^"]*)"', query):
            assert line[name] == value
    numbers = {"ttft_ms", "total_ms", "prompt_tokens", "image_tokens", "completion_tokens", "status"}
    assert all(isinstance(lines[0][name], int | float) for name in numbers)
