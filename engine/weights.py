"""Which files of a directory hold a model's weights."""

from __future__ import annotations

import json
from pathlib import Path

from engine.errors import ModelLoadError

_SAFE = ("model.safetensors", "model.safetensors.index.json")
_MISTRAL = ("consolidated.safetensors", "consolidated.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def weight_files(folder: Path, *, pickled: bool = False, named: str | None = None) -> list[Path]:
    """The files to read, all of them there: in one piece, or as an index names them. Those of Mistral's own format are
    taken where there are no others in safetensors.

    pickled: whether they may be PyTorch's own, which are pickles, where there are no safetensors. named: the file or
    index that config.json says (`transformers_weights`). Raises ModelLoadError saying what is missing.
    """
    names = (named,) if named else (*_SAFE, *_MISTRAL, *_PICKLED)
    found = next((name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise ModelLoadError(
            f"the model's directory holds no weights: there is neither {' nor '.join(names)}; give a complete one"
        )
    files = _shards(folder / found) if found.endswith(".json") else [found]
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ModelLoadError(f"{found} names {missing[0]}, which is missing: give a complete directory")
    if not pickled and (unsafe := [file for file in files if not file.endswith(".safetensors")]):
        raise ModelLoadError(
            f"the model's weights are not in safetensors but in {unsafe[0]}, which is a pickle: convert them "
            "(transformers' save_pretrained writes safetensors), or set option.load_format=pt, which reads them "
            "without running what is in them"
        )
    return [folder / file for file in files]


def _shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return sorted(str(name) for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index.name} of the model cannot be read: it holds no weight_map") from error
