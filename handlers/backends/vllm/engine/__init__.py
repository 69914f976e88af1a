"""vLLM's engine and its processes: built, watched, asked, replaced, ended."""
