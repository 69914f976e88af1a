"""Models in Mistral's own format: no backend serves them, only the Hugging Face one that many have beside it."""

from __future__ import annotations

from pathlib import Path

from properties.problem import Problem


def format_problems(model_path: Path) -> list[Problem]:
    """Why a model that has nothing but Mistral's own format cannot be served."""
    if (model_path / "params.json").is_file() and not (model_path / "config.json").is_file():
        return [
            Problem(
                "the model has params.json and no config.json, which is Mistral's own format: serve the model in the "
                "Hugging Face format",
                "model_id",
            )
        ]
    own = mistral_tokenizer(model_path)
    problems = []
    if own is not None and not (model_path / "tokenizer.json").is_file():
        problems.append(Problem(only_mistral(own), "model_id"))
    weights = [path.name for kind in ("*.safetensors", "*.bin") for path in model_path.glob(kind)]
    if weights and all(name.startswith("consolidated") for name in weights):
        problems.append(
            Problem(
                "the model has its weights as consolidated*.safetensors only, Mistral's own format: serve the model in "
                "the Hugging Face format",
                "model_id",
            )
        )
    return problems


def mistral_tokenizer(model_path: Path) -> str | None:
    """The file that holds Mistral's own tokenizer; None where there is none."""
    found = [*model_path.glob("tekken.json"), *model_path.glob("tokenizer.model.v*")]
    return found[0].name if found else None


def only_mistral(file: str) -> str:
    """What to say of a model that has no other tokenizer than that file."""
    return (
        f"the model has its tokenizer as {file} only, Mistral's own format, and no tokenizer.json: serve the model in "
        "the Hugging Face format, or put the tokenizer.json and tokenizer_config.json of that beside it"
    )
