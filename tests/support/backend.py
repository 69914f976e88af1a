"""Which backend the live tests serve with: LMI_TEST_BACKEND, `rolling` where it is not set."""

from __future__ import annotations

import os

VLLM = os.environ.get("LMI_TEST_BACKEND", "rolling") == "vllm"

OPTIONS = ("rolling_batch=vllm", "enforce_eager=true", "kv_cache_memory_mb=256") if VLLM else ("spare_engine=false",)
"""For every server, before the test's own. A spare engine would be one more process to those who count them."""

READY_SECONDS = 240.0 if VLLM else 90.0

STOP_SECONDS = 120.0 if VLLM else 40.0
"""Until a server that stops, or cannot start, has ended: vLLM sees late what is wrong."""

ENGINE_PROCESS = "EngineCore" if VLLM else "engine.process"
"""In the command line of an engine's process."""

BACK = "the engine is back" if VLLM else "replica 0 is back"
"""What the log says when a killed engine has been replaced."""
