"""These tests need vLLM (`make install-vllm`, `make test-vllm`); without it none is collected."""

from __future__ import annotations

from handlers.backends.vllm.compat import installed_version

collect_ignore_glob = [] if installed_version() else ["test_*.py"]
