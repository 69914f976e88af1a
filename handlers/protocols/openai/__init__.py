"""OpenAI's API: chat completions and completions, with vLLM's additions."""
