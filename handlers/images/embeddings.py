"""Embeddings in place of images: from the base64 text of a `torch.save` file to numbers, without torch.

Nothing in the file is executed. It is an uncompressed zip archive: `data.pkl` is a pickle that describes how the tensor
is rebuilt, and `data/0` holds its values. Only the few instructions that describe one dense tensor are followed, and
the names in the pickle are never looked up. Only the archive's directory is read, within bounds; the archive is never
unpacked. PyTorch's notes on serialization describe the format
(https://docs.pytorch.org/docs/stable/notes/serialization.html).
"""

from __future__ import annotations

import hashlib
import pickletools
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import numpy as np
import pybase64

from handlers.images import ImageProblem, too_many_bytes
from handlers.request import EmbeddingsPart, Grid, LoadedEmbeddings

_DIRECTORY_END = struct.Struct("<4s4H2LH")
_DIRECTORY_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_MAX_ENTRIES = 64
_MAX_DIRECTORY_BYTES = 2**14
_MAX_PICKLE_BYTES = 2**12
_MAX_DIMENSIONS = 8
_LARGEST = 2**40

_STORAGES = {
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "FloatStorage": ("float32", 4),
    "DoubleStorage": ("float64", 8),
    "IntStorage": ("int32", 4),
    "LongStorage": ("int64", 8),
}
"""torch's name for a storage -> numpy's name for an element, and its size in bytes."""

_SAVE_ANEW = "send what torch.save writes for one dense tensor"


class BadTensorFile(ValueError):
    """The file cannot be used. The message is for the client; from the file's content it quotes only names."""


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor in a file.

    Attributes:
        dtype: torch's name.
        shape: Size of each dimension.
        data: Values in C order, a view of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def read_tensor(file: bytes, allowed: Sequence[str]) -> SavedTensor:
    """Read the one tensor in a file without copying, in one pass over its bytes. allowed: the types it may have.

    Raises:
        BadTensorFile: The file does not hold exactly one dense tensor of an allowed type.
    """
    entries = dict(_entries(memoryview(file)))
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise BadTensorFile(f"it does not hold a saved tensor; {_SAVE_ANEW}")
    root = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{root}byteorder")
    if order is not None and bytes(order.content[:16]) != b"little":
        raise BadTensorFile("it was saved on a big-endian machine; save it on a little-endian one")
    pickled = entries[pickles[0]]
    if len(pickled.content) > _MAX_PICKLE_BYTES:
        raise BadTensorFile(f"it holds more than a tensor; {_SAVE_ANEW}")
    view = _view(bytes(pickled.checked()))
    dtype, itemsize = _STORAGES.get(view.storage.kind, (view.storage.kind, 0))
    if dtype not in allowed:
        raise BadTensorFile(f"its numbers are {dtype[:40]!r}; allowed: {', '.join(allowed)}")
    values = entries.get(f"{root}data/{view.storage.key}")
    if values is None or len(values.content) != view.storage.count * itemsize:
        raise BadTensorFile("its values are missing or cut short")
    data = values.checked()
    start, count = view.offset, prod(view.shape)
    if count == 0:
        raise BadTensorFile(f"its tensor is empty: {list(view.shape)}")
    if _strides(view.shape) != _of_long_dimensions(view.shape, view.strides):
        raise BadTensorFile(
            f"its tensor is not contiguous: strides {list(view.strides)} for {list(view.shape)}; save "
            "tensor.contiguous()"
        )
    if start + count > view.storage.count:
        raise BadTensorFile("its tensor reaches beyond the values in the file; save tensor.clone()")
    return SavedTensor(dtype, view.shape, data[start * itemsize : (start + count) * itemsize])


@dataclass(frozen=True, slots=True)
class _Entry:
    """An entry of the archive. `content` is a view, so overlapping entries cost nothing."""

    content: memoryview
    crc: int

    def checked(self) -> memoryview:
        if zlib.crc32(self.content) != self.crc:
            raise BadTensorFile("it is damaged: a checksum is wrong")
        return self.content


def _entries(file: memoryview) -> Iterator[tuple[str, _Entry]]:
    """Yield (name, entry) for each entry of the directory."""
    end = len(file) - _DIRECTORY_END.size
    if end < 0 or bytes(file[:4]) != b"PK\3\4" or bytes(file[end : end + 4]) != b"PK\5\6":
        raise BadTensorFile(f"it is not a file of torch.save, or is cut short; {_SAVE_ANEW}")
    _, _, _, _, count, length, at, comment = _DIRECTORY_END.unpack_from(file, end)
    if count > _MAX_ENTRIES or length > _MAX_DIRECTORY_BYTES or at + length > end or comment:
        raise BadTensorFile(f"its directory is not one that torch.save writes; {_SAVE_ANEW}")
    for _ in range(count):
        if at + _DIRECTORY_ENTRY.size > end:
            raise BadTensorFile("its directory is cut short")
        signature, _, _, flags, method, _, _, crc, packed, size, *rest = _DIRECTORY_ENTRY.unpack_from(file, at)
        name_length, extra, note, _, _, _, offset = rest
        if signature != b"PK\1\2":
            raise BadTensorFile("its directory is damaged")
        if method != 0 or packed != size or flags & 1:
            raise BadTensorFile(f"it is compressed or encrypted, as torch.save does not do; {_SAVE_ANEW}")
        name = bytes(file[at + _DIRECTORY_ENTRY.size :][:name_length]).decode("utf-8", "replace")
        at += _DIRECTORY_ENTRY.size + name_length + extra + note
        yield name, _Entry(_content(file, offset, size), crc)


def _content(file: memoryview, offset: int, size: int) -> memoryview:
    if offset + _LOCAL_HEADER.size > len(file):
        raise BadTensorFile("its directory points beyond its end")
    *_, name, extra = _LOCAL_HEADER.unpack_from(file, offset)
    start = offset + _LOCAL_HEADER.size + name + extra
    if start + size > len(file):
        raise BadTensorFile("it says that it holds more than it does")
    return file[start : start + size]


@dataclass(frozen=True, slots=True)
class _Name:
    """A name that the pickle refers to. It is not looked up here, and may not even be text."""

    module: Any
    name: Any


@dataclass(frozen=True, slots=True)
class _Storage:
    kind: str
    key: str
    count: int


@dataclass(frozen=True, slots=True)
class _View:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_MARK = object()
_HOOKS = object()
"""The empty OrderedDict that accompanies every tensor."""


def _view(pickled: bytes) -> _View:
    try:
        found = _followed(pickled)
    except BadTensorFile:
        raise
    except Exception as error:  # pickletools and an empty stack raise many kinds of errors
        raise BadTensorFile(f"its pickle is damaged; {_SAVE_ANEW}") from error
    if not isinstance(found, _View):
        raise BadTensorFile(f"it holds no tensor, or more than one; {_SAVE_ANEW}")
    return found


def _followed(pickled: bytes) -> Any:
    """Return the top of the stack at the end of a pickle that only describes a tensor."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, operand, _ in pickletools.genops(pickled):
        name, argument = opcode.name, cast(Any, operand)
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _WRITTEN_OUT:
            stack.append(argument)
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "GLOBAL":
            stack.append(_Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_Name(module, attribute))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _TUPLES:
            stack.append(tuple(stack.pop() for _ in range(_TUPLES[name]))[::-1])
        elif name == "TUPLE":
            items = []
            while (item := stack.pop()) is not _MARK:
                items.append(item)
            stack.append(tuple(reversed(items)))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_rebuilt(function, arguments))
        elif name == "STOP":
            return stack.pop()
        else:
            raise BadTensorFile(f"it holds more than a tensor; {_SAVE_ANEW}")
    return None


_CONSTANTS = {"MARK": _MARK, "NEWTRUE": True, "NEWFALSE": False, "NONE": None, "EMPTY_TUPLE": ()}
_WRITTEN_OUT = {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _storage(reference: Any) -> _Storage:
    match reference:
        case ("storage", _Name(str(), str(kind)), str(key), str(), int(count)):
            return _Storage(kind, key, _whole(count))
    raise BadTensorFile(f"it holds more than a tensor; {_SAVE_ANEW}")


def _rebuilt(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Name("collections", "OrderedDict"), ():
            return _HOOKS
        case (
            _Name("torch._utils", "_rebuild_tensor_v2"),
            (_Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), hooks),
        ) if hooks is _HOOKS and len(shape) == len(strides) <= _MAX_DIMENSIONS:
            return _View(storage, _whole(offset), tuple(map(_whole, shape)), tuple(map(_whole, strides)))
        case _Name("torch._utils", "_rebuild_parameter"), (_View() as view, bool(), hooks) if hooks is _HOOKS:
            return view
        case _Name(str(module), str(name)), _:
            raise BadTensorFile(f"it holds {f'{module}.{name}'[:80]!r}, not a dense tensor; {_SAVE_ANEW}")
    raise BadTensorFile(f"it holds more than a tensor; {_SAVE_ANEW}")


def _whole(number: Any) -> int:
    if not isinstance(number, int) or not 0 <= number <= _LARGEST:
        raise BadTensorFile("a size in it is out of range")
    return int(number)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous array, without dimensions of size one."""
    return _of_long_dimensions(shape, tuple(prod(shape[i + 1 :]) for i in range(len(shape))))


def _of_long_dimensions(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(stride for size, stride in zip(shape, strides, strict=True) if size != 1)


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
    """Read the files of a part, together at most `max_bytes`. Run it in a thread: 1 MB takes a few milliseconds.

    Raises:
        ImageProblem: The files cannot be used.
    """
    if part.characters > 4 * (max_bytes // 3 + 2):
        raise too_many_bytes(max_bytes)
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
            raise too_many_bytes(max_bytes)
        digest.update(hashlib.sha256(grid_file).digest())
        grid = _grid(_tensor(grid_file, _GRID, _INTEGERS))
    elif part.grid is not None:
        grid = part.grid
        digest.update(b"%d %d %d" % grid)
    if len(file) > max_bytes:
        raise too_many_bytes(max_bytes)
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
