"""Models in Mistral's own format, which many have beside the Hugging Face one; the latter is served where it is there.

Prompts are rendered and tokenised by this server, with tokenizer.json. vLLM takes Mistral's own files where it sees
them, so it is told which to take: Mistral's for a model that has its weights in nothing else, as Pixtral-12B-2409.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from handlers.backends.mistral_format import mistral_tokenizer, mistral_weights_alone
from properties.names import PREFIX
from properties.problem import Problem

if TYPE_CHECKING:
    from properties.configuration import Configuration


def replaced_formats(configuration: Configuration, model_path: Path) -> dict[str, str]:
    """vLLM's argument -> what it has to be told, so that it reads what this server reads; {} for most models."""
    alone = mistral_weights_alone(model_path)
    if not alone and not _own(model_path) and not _asked(configuration):
        return {}
    format = "mistral" if alone else "hf"
    told = {"tokenizer_mode": format, "config_format": format}
    if configuration.settings.load_format.lower() in ("auto", "mistral"):
        told["load_format"] = format
    return told


def format_warnings(configuration: Configuration, model_path: Path) -> list[Problem]:
    """That what was asked for is not done."""
    if mistral_weights_alone(model_path):
        return []
    return [
        Problem(
            f"{PREFIX}{name} = mistral ({where}) is not used: the model is served in the Hugging Face format, with "
            "tokenizer.json",
            name if name != "config_format" else None,
        )
        for name, where in _asked(configuration).items()
    ]


def weight_problems(model_path: Path) -> list[Problem]:
    """vLLM leaves Mistral's own weights out where an index names the others, and else reads both. Those alone it reads
    with params.json and Mistral's own tokenizer."""
    if mistral_weights_alone(model_path):
        tokenizer = None if mistral_tokenizer(model_path) else "tekken.json"
        missing = tokenizer if (model_path / "params.json").is_file() else "params.json"
        return [] if missing is None else [_without(missing)]
    others = [path for path in model_path.glob("*.safetensors") if not path.name.startswith("consolidated")]
    index = model_path / "model.safetensors.index.json"
    if index.is_file() or not others or not any(model_path.glob("consolidated*.safetensors")):
        return []
    return [
        Problem(
            f"the model has consolidated*.safetensors beside {others[0].name} and no {index.name}, so vLLM would read "
            "both: remove consolidated*.safetensors, which are the same weights in Mistral's own format",
            "model_id",
        )
    ]


def _without(file: str) -> Problem:
    return Problem(
        f"the model has its weights as consolidated*.safetensors only, Mistral's own format, which vLLM reads with "
        f"{file}, and that is missing: complete the download, or serve the model in the Hugging Face format",
        "model_id",
    )


def _own(model_path: Path) -> bool:
    return mistral_tokenizer(model_path) is not None or any(model_path.glob("consolidated*.safetensors"))


def _asked(configuration: Configuration) -> dict[str, str]:
    """The options that name Mistral's own format, and where; vLLM wants all three or none."""
    settings, sources = configuration.settings, configuration.sources
    found = {
        name: sources[name].location
        for name in ("tokenizer_mode", "load_format")
        if getattr(settings, name).lower() == "mistral"
    }
    written = configuration.extra.get("config_format")
    if written is not None and written.value.lower() == "mistral":
        found["config_format"] = written.source.location
    return found
