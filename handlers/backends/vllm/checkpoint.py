"""What vLLM reads of a model's files: the format, the data type, and whether there are weights at all.

vLLM itself finds this out after it has started all its processes. Prompts are tokenised by this server, with
tokenizer.json. vLLM prefers Mistral's own files where they exist, so the arguments name the files to use: Mistral's
only for a model that has no other weights, such as Pixtral-12B-2409.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handlers.backends.mistral_format import mistral_tokenizer, mistral_weights_alone
from handlers.backends.weight_files import INDEX, read_header, safetensors_files, vllm_weight_problems
from properties.model import model_dtype
from properties.names import PREFIX
from properties.problem import Problem

if TYPE_CHECKING:
    from properties.configuration import Configuration

_KINDS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_OWN_WEIGHTS = "consolidated*.safetensors"

_READ_AS_THEY_ARE = frozenset({"auto", "hf", "safetensors"})
"""Formats of option.load_format that take the checkpoint's files as they lie there."""


def weight_problems(folder: Path, load_format: str) -> Iterator[str]:
    """Yield why vLLM would find no weights in this folder, read them twice, or not be able to read them.

    Formats other than `auto` may have their weights elsewhere. vLLM leaves Mistral's own weights out if an index names
    the others, and reads both otherwise; if they are alone, it reads them with params.json and Mistral's tokenizer.
    """
    if load_format == "auto" and not any(file.suffix in _KINDS for file in folder.rglob("*")):
        yield (
            f"vLLM cannot serve the model: there are no weights in its folder (files that end in {', '.join(_KINDS)}); "
            "give a complete one, or option.load_format"
        )
        return
    if load_format.lower() in _READ_AS_THEY_ARE:
        yield from vllm_weight_problems(folder)
    if mistral_weights_alone(folder):
        missing = None if mistral_tokenizer(folder) else "tekken.json"
        if not (folder / "params.json").is_file():
            missing = "params.json"
        if missing is not None:
            yield (
                f"the model has its weights as {_OWN_WEIGHTS} only, Mistral's own format, which vLLM reads with "
                f"{missing}, and that is missing: complete the download, or serve the model in the Hugging Face format"
            )
        return
    others = [path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated")]
    if others and any(folder.glob(_OWN_WEIGHTS)) and not (folder / INDEX).is_file():
        yield (
            f"the model has {_OWN_WEIGHTS} beside {others[0].name} and no {INDEX}, so vLLM would read both: remove "
            f"{_OWN_WEIGHTS}, which are the same weights in Mistral's own format"
        )


def replaced_formats(configuration: Configuration, folder: Path) -> dict[str, str]:
    """Return the format arguments that vLLM needs to read the same files as this server."""
    load_format = configuration.settings.load_format.lower()
    formats: dict[str, str] = {}
    if load_format == "pt" and not any(folder.glob("*.pt")):
        formats["load_format"] = "auto"  # vLLM's `pt` reads *.pt only, and `auto` also *.bin
    alone = mistral_weights_alone(folder)
    own = mistral_tokenizer(folder) is not None or any(folder.glob(_OWN_WEIGHTS))
    if alone or own or _asked_for_mistral(configuration):
        format = "mistral" if alone else "hf"
        formats |= {"tokenizer_mode": format, "config_format": format}
        if load_format in ("auto", "mistral"):
            formats["load_format"] = format
    return formats


def format_warnings(configuration: Configuration, folder: Path) -> list[Problem]:
    """Return a warning for each option that asks for Mistral's own format where the other is served."""
    if mistral_weights_alone(folder):
        return []
    return [
        Problem(
            f"{PREFIX}{name} = mistral ({where}) is not used: the model is served in the Hugging Face format, with "
            "tokenizer.json",
            name if name != "config_format" else None,
        )
        for name, where in _asked_for_mistral(configuration).items()
    ]


def _asked_for_mistral(configuration: Configuration) -> dict[str, str]:
    """Return the options that name Mistral's own format, and where; vLLM wants all three or none."""
    settings, sources = configuration.settings, configuration.sources
    found = {
        name: sources[name].location
        for name in ("tokenizer_mode", "load_format")
        if getattr(settings, name).lower() == "mistral"
    }
    written = configuration.extra.get("config_format")
    if written is not None and written.value.lower() == "mistral":
        found["config_format"] = written.location
    return found


def stored_dtype(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the type that config.json names, or else the widest one of the weights; None if neither is clear.

    As vLLM's vllm/transformers_utils/model_arch_config_convertor.py, `get_torch_dtype`.
    """
    vision = config.get("vision_config")
    named = model_dtype(config) or (model_dtype(vision) if isinstance(vision, Mapping) else None)
    if named is not None:
        return named
    try:
        tensors = [tensor for path in safetensors_files(folder) for tensor in read_header(path).values()]
    except (ValueError, OSError):  # reported where the files are checked
        return None
    found = {_DTYPES[tensor.dtype] for tensor in tensors if tensor.dtype in _DTYPES}
    return "float32" if "float32" in found else found.pop() if len(found) == 1 else None


def served_dtype(name: str, stored: str | None, *, bfloat16: bool) -> tuple[str, str]:
    """Return the type in which vLLM computes, and the reason.

    The rule is vLLM's vllm/config/model.py, `_resolve_auto_dtype`: float32 becomes the first type that the device
    supports.

    Args:
        name: option.dtype.
        stored: See `stored_dtype`.
        bfloat16: Whether the device computes in it.
    """
    if name != "auto":
        return name, "option.dtype says so"
    half = "bfloat16" if bfloat16 else "float16"
    if stored is None:
        return half, "config.json does not name a type, and the weights none or several"
    if stored == "float32":
        return half, f"vLLM serves what is stored in float32 in {half}; option.dtype=float32 keeps it"
    if stored == "bfloat16" and not bfloat16:
        return half, "the model is stored in bfloat16, in which this accelerator does not compute"
    return stored, "as the model is stored"
