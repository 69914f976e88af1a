"""LoRA adapters: where they lie, and which the engine holds."""
