"""From vLLM's outputs to deltas, and vLLM's own parsers of them."""
