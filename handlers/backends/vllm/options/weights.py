"""Whether there is anything to load: vLLM itself finds out when all its processes have started."""

from __future__ import annotations

from pathlib import Path

_KINDS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def vllm_load_format(folder: Path, load_format: str) -> dict[str, str]:
    """vLLM's argument, where it has to be told another word: its `pt` takes *.pt alone, and `auto` also .bin."""
    if load_format.lower() == "pt" and not any(folder.glob("*.pt")):
        return {"load_format": "auto"}
    return {}


def missing_weights(folder: Path, load_format: str) -> str | None:
    """Why the model in this folder cannot be loaded; None where it may be. Other formats than `auto` find their own."""
    if load_format != "auto" or any(file.suffix in _KINDS for file in folder.rglob("*")):
        return None
    return (
        f"vLLM cannot serve the model: there are no weights in its folder (files that end in {', '.join(_KINDS)}); "
        "give a complete one, or option.load_format"
    )
