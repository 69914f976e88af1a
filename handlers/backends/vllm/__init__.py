"""vLLM's `AsyncLLM` as a backend. Only `compat` imports vLLM, and only when it serves."""
