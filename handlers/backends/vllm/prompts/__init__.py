"""From our request to vLLM's input, sampling parameters and constraints."""
