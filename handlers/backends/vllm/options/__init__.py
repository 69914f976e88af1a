"""From the configuration to vLLM's engine arguments, and what is wrong with them before anything is loaded."""
