"""Models in Mistral's own format: what cannot be served after `handlers.artefacts.mistral` has completed a model."""

from __future__ import annotations

from pathlib import Path

from properties.problem import Problem


def format_problems(model_path: Path) -> list[Problem]:
    """Return why a model in that format cannot be served."""
    if (model_path / "params.json").is_file() and not (model_path / "config.json").is_file():
        return [
            Problem(
                "the model has params.json and no config.json, which is Mistral's own format and not read here: serve "
                "the model in the Hugging Face format",
                "model_id",
            )
        ]
    own = mistral_tokenizer(model_path)
    if own is not None and not (model_path / "tokenizer.json").is_file():
        return [Problem(only_mistral(own), "model_id")]
    return []


def mistral_weights_alone(model_path: Path) -> bool:
    """Whether all the weights that a model has are in that format."""
    names = [path.name for kind in ("*.safetensors", "*.bin") for path in model_path.glob(kind)]
    return bool(names) and all(name.startswith("consolidated") for name in names)


def mistral_tokenizer(model_path: Path) -> str | None:
    """Return the name of the file that holds Mistral's own tokenizer; None if there is none."""
    found = [*model_path.glob("tekken.json"), *model_path.glob("tokenizer.model.v*")]
    return found[0].name if found else None


def only_mistral(file: str) -> str:
    """Return the problem of a model that has no other tokenizer than that file."""
    return (
        f"the model has its tokenizer as {file} only, Mistral's own format, and no tokenizer.json: serve the model in "
        "the Hugging Face format, or put the tokenizer.json and tokenizer_config.json of that beside it"
    )
