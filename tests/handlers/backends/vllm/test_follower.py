"""The workers of a machine that is not the first: they must understand the arguments as it does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from handlers.backends.vllm import compat, follower


def test_they_take_steps_of_the_first_machines_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a large device vLLM makes them four times as large for its server as for who does not say what it is."""

    class Arguments:
        def __init__(self, **given: Any) -> None:
            self.given = given

        def create_engine_config(self, usage_context: Any = None, headless: bool = False) -> Any:
            return self.given, usage_context, headless

    vllm = SimpleNamespace(AsyncEngineArgs=Arguments, server_context="a server")
    monkeypatch.setattr(compat, "load", lambda: vllm)
    monkeypatch.setattr(compat, "multiproc_executor", lambda: lambda config, monitor_workers: (config, monitor_workers))
    assert follower._joined({"nnodes": 2}) == (({"nnodes": 2}, "a server", True), False)
