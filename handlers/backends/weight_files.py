"""Which files hold a model's weights, and whether they are complete: their headers tell, without loading them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open

from engine.errors import ModelLoadError
from engine.weights import weight_files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_INDEX = "pytorch_model.bin.index.json"

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Of one element of safetensors' types."""

_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorEntry:
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: list[int]


def safetensors_files(directory: Path) -> list[Path]:
    """Return the checkpoint's files, whether they exist or not; empty if it has none of this format.

    Mistral's second copy (consolidated*) is left out if there is another. Raises ValueError, which names the index, if
    that is damaged.
    """
    if (directory / INDEX).is_file():
        return [directory / name for name in sorted(set(_weight_map(directory / INDEX).values()))]
    files = sorted(directory.glob("*.safetensors"))
    return [path for path in files if not path.name.startswith("consolidated")] or files


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a file, by name. torch is not imported.

    Raises:
        ValueError: The file is damaged or truncated; the message names it.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(len(_LFS))
    if start == _LFS:
        raise ValueError(
            f"{path.name} is not a safetensors file but a Git LFS pointer to it: fetch it with `git lfs pull`"
        )
    try:
        with safe_open(path, "np") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict
            return {name: TensorEntry(part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or cut off ({error}): fetch it again") from None


def engine_weight_problems(directory: Path, *, pickled: bool, named: object = None) -> Iterator[str]:
    """Yield why the embedded engine cannot load the weights; the arguments are those of `weight_files`."""
    try:
        files = weight_files(directory, pickled=pickled, named=named if isinstance(named, str) else None)
    except ModelLoadError as error:
        yield str(error)
        return
    if (directory / INDEX).is_file() and not (directory / SINGLE).is_file():
        yield from _indexed(directory)
    else:
        yield from _damaged(path for path in files if path.suffix == ".safetensors")


def vllm_weight_problems(directory: Path) -> Iterator[str]:
    """Yield why vLLM cannot load the weights. It loads every file of this format, under any name."""
    if (directory / INDEX).is_file():
        yield from _indexed(directory)
    else:
        yield from _damaged(safetensors_files(directory))


def _damaged(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        yield from _damage(path)


def _indexed(directory: Path) -> Iterator[str]:
    """Yield what is wrong with the files that the index names."""
    try:
        places = _weight_map(directory / INDEX)
    except ValueError as error:
        yield str(error)
        return
    names = sorted(set(places.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        yield f"{missing[0]}{more}, which {INDEX} names, is not in {directory}: complete the download"
    for name in names:
        if name not in missing and name.endswith(".safetensors"):
            yield from _damage(directory / name, {tensor for tensor, place in places.items() if place == name})


def unreadable(path: Path, error: OSError) -> str:
    """Return why the operating system does not let us read a file, and what to do if permission is missing."""
    remedy = f"; let user {os.getuid()} read it" if isinstance(error, PermissionError) else ""
    return f"{path} cannot be read: {error.strerror}{remedy}"


def _damage(path: Path, wanted: Set[str] = frozenset()) -> Iterator[str]:
    """Yield what is wrong with a file, in which the `wanted` tensors must be."""
    try:
        lacking = wanted - read_header(path).keys()
    except ValueError as error:
        yield str(error)
    except OSError as error:
        yield unreadable(path, error)
    else:
        if lacking:
            yield f"{path.name} has no tensor {min(lacking)}, which its index names: fetch both again"


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file. Raises ValueError."""
    try:
        content = msgspec.json.decode(index.read_bytes(), type=dict[str, Any])
        places = msgspec.convert(content["weight_map"], dict[str, str])
    except (OSError, KeyError, msgspec.MsgspecError):
        places = {}
    if not places:
        raise ValueError(f"{index.name} is no index of weights: it is damaged; fetch it again")
    return places
