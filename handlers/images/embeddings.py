"""Embeddings in place of images: from base64 to numbers, without torch and without executing what the file says."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pybase64

from handlers.errors import ImageTooLarge
from handlers.images.problem import ImageProblem
from handlers.images.tensor_file import BadTensorFile, SavedTensor, read_tensor
from handlers.request import EmbeddingsPart, Grid, LoadedEmbeddings

_ROWS, _GRID = "image_embeds", "image_grid_thw"


@dataclass(frozen=True, slots=True)
class EncodedEmbeddings:
    """Embeddings that have been checked but not converted."""

    tensor: SavedTensor
    grid: Grid | None
    digest: bytes

    @property
    def size(self) -> int:
        """Bytes of the numbers in float32."""
        tokens, hidden = self.tensor.shape
        return tokens * hidden * 4

    def decode(self) -> LoadedEmbeddings:
        """Convert to float32. Run it in a thread.

        Raises:
            ImageProblem: Some numbers are not finite.
        """
        raw = np.frombuffer(self.tensor.data, _DTYPES[self.tensor.dtype])
        if self.tensor.dtype == "bfloat16":
            wide = raw.astype("<u4")
            wide <<= 16  # it is the upper half of a float32
            numbers = wide.view("<f4")
        else:
            with np.errstate(over="ignore"):
                numbers = raw.astype("<f4")
        rows = numbers.reshape(self.tensor.shape)
        largest = float(max(rows.max(), -rows.min()))
        if not np.isfinite(largest):
            raise ImageProblem(f"{_ROWS} holds numbers that are not finite in float32")
        return LoadedEmbeddings(rows, largest, self.grid, self.digest)


_DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8"}
_INTEGERS = ("int32", "int64")


def read_embeddings(part: EmbeddingsPart, max_bytes: int) -> EncodedEmbeddings:
    """Read the files of a part. Run it in a thread: it costs a few milliseconds per megabyte.

    Args:
        part: The part of the request.
        max_bytes: Greatest size of the files together.

    Raises:
        ImageProblem: The files cannot be used.
    """
    if part.characters > 4 * (max_bytes // 3 + 2):
        raise _too_large(max_bytes)
    file = _decoded(part.rows, _ROWS)
    tensor = _tensor(file, _ROWS, tuple(_DTYPES))
    shape = tensor.shape
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) != 2:
        raise ImageProblem(
            f"{_ROWS} has the shape {list(shape)}; wanted: [tokens, hidden size], one part for each image"
        )
    digest = hashlib.sha256(b"embeddings ")
    digest.update(hashlib.sha256(file).digest())
    grid: Grid | None = None
    if isinstance(part.grid, str):
        grid_file = _decoded(part.grid, _GRID)
        if len(file) + len(grid_file) > max_bytes:
            raise _too_large(max_bytes)
        digest.update(hashlib.sha256(grid_file).digest())
        grid = _grid(_tensor(grid_file, _GRID, _INTEGERS))
    elif part.grid is not None:
        grid = part.grid
        digest.update(b"%d %d %d" % grid)
    if len(file) > max_bytes:
        raise _too_large(max_bytes)
    return EncodedEmbeddings(SavedTensor(tensor.dtype, shape, tensor.data), grid, digest.digest())


def _decoded(text: str, name: str) -> bytes:
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError as error:
        raise ImageProblem(f"{name} is not valid base64") from error


def _tensor(file: bytes, name: str, dtypes: tuple[str, ...]) -> SavedTensor:
    try:
        return read_tensor(file, dtypes)
    except BadTensorFile as error:
        raise ImageProblem(f"{name}: {error}") from error


def _grid(tensor: SavedTensor) -> Grid:
    """Read [3] or [1, 3] integers, each at least one."""
    if tensor.shape not in ((3,), (1, 3)):
        raise ImageProblem(f"{_GRID} has the shape {list(tensor.shape)}; wanted: [3]")
    frames, rows, columns = np.frombuffer(tensor.data, "<i4" if tensor.dtype == "int32" else "<i8").tolist()
    if min(frames, rows, columns) < 1:
        raise ImageProblem(f"{_GRID} is {[frames, rows, columns]}; wanted: numbers from 1")
    return frames, rows, columns


def _too_large(max_bytes: int) -> ImageProblem:
    return ImageProblem(f"it has more than {max_bytes} bytes (option.max_image_bytes)", ImageTooLarge)
