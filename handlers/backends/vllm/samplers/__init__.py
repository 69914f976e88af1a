"""Samplers that vLLM lacks: what a request carries, and the processor in vLLM's engine that obeys it."""
