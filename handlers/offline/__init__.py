"""Offline inference: a model in a script, without a server, in the shapes that vLLM's and Aphrodite's users write."""
