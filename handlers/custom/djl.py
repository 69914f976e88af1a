"""The package `djl_python` that handlers import: the parts of DJL Serving's package that they need."""

from __future__ import annotations

import csv
import datetime
import io
import json
import sys
from collections.abc import AsyncIterable, Callable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

Stream = Iterable[Any] | AsyncIterable[Any]


class PairList:
    """Values in the order in which they were added, each with a key or None."""

    def __init__(self) -> None:
        self.keys: list[str | None] = []
        self.values: list[bytes] = []

    def size(self) -> int:
        return len(self.values)

    def is_empty(self) -> bool:
        return not self.values

    def add(self, key: str | None = None, value: bytes = b"") -> None:
        self.keys.append(key)
        self.values.append(value)

    def get(self, key: str) -> bytes | None:
        return self.values[self.keys.index(key)] if key in self.keys else None

    def get_keys(self) -> list[str | None]:
        return self.keys

    def get_values(self) -> list[bytes]:
        return self.values

    def key_at(self, index: int) -> str | None:
        return self.keys[index]

    def value_at(self, index: int) -> bytes:
        return self.values[index]


class Input:
    """A request, with its headers as properties and its body as content. The first one has no content."""

    def __init__(self) -> None:
        self.function_name: str | None = None
        self.properties: dict[str, str] = {}
        self.content = PairList()

    def is_empty(self) -> bool:
        return self.content.is_empty()

    def is_batch(self) -> bool:
        return False

    def get_batch_size(self) -> int:
        return 1

    def get_batches(self) -> list[Input]:
        return [self]

    def get_function_name(self) -> str | None:
        return self.function_name

    def get_properties(self) -> dict[str, str]:
        return self.properties

    def get_property(self, key: str) -> str | None:
        """Return a property; the case of the key does not matter."""
        return next((value for name, value in self.properties.items() if name.lower() == key.lower()), None)

    def get_content(self) -> PairList:
        return self.content

    def contains_key(self, key: str) -> bool:
        return self.content.get(key) is not None

    def get_data(self, key: str | None = None) -> Any:
        """Return the content, decoded as its type says."""
        return None if self.is_empty() else decode(self, self.get_property("content-type") or "", key)

    def get_as_bytes(self, key: str | None = None) -> bytes | None:
        if self.is_empty():
            return None
        value = self.content.get("data" if key is None else key)
        if value is None and key is not None:
            raise KeyError(f"the request has no {key!r}")
        return self.content.value_at(0) if value is None else value

    def get_as_string(self, key: str | None = None) -> str:
        return (self.get_as_bytes(key) or b"").decode()

    def get_as_json(self, key: str | None = None) -> Any:
        return json.loads(self.get_as_bytes(key) or b"")

    def get_as_image(self, key: str | None = None) -> Image:
        from PIL import Image

        return Image.open(io.BytesIO(self.get_as_bytes(key) or b""))

    def get_as_npz(self, key: str | None = None) -> list[Any]:
        import numpy

        arrays = numpy.load(io.BytesIO(self.get_as_bytes(key) or b""), allow_pickle=False)
        return [arrays[name] for name in arrays.files]

    def get_as_csv(self, key: str | None = None) -> list[dict[str | Any, str | Any]]:
        return list(csv.DictReader(io.StringIO(self.get_as_string(key))))


class Output:
    """A reply: a status code, properties that become headers, and either one content or a stream."""

    def __init__(self, code: int = 200, message: str = "OK") -> None:
        self.code = code
        self.message = message
        self.properties: dict[str, str] = {}
        self.content = PairList()
        self.stream_content: Stream | None = None
        self.stream_formatter: Callable[[Any], Any] | None = None

    def set_code(self, code: int) -> Output:
        self.code = code
        return self

    def set_message(self, message: str) -> Output:
        self.message = message
        return self

    def error(self, error: str, code: int = 424, message: str = "prediction failure") -> Output:
        """Replace what was added with an error, which the client sees."""
        self.code, self.message, self.content = code, message, PairList()
        self.add_property("content-type", "application/json")
        return self.add_as_json({"code": code, "message": message, "error": error})

    def add_property(self, key: str, val: Any) -> Output:
        self.properties[key] = str(val)
        return self

    def add(self, value: Any, key: str | None = None, batch_index: int | None = None) -> Output:
        if isinstance(value, str | bytes | bytearray | memoryview):
            self.content.add(key, value.encode() if isinstance(value, str) else bytes(value))
            return self
        return self.add_as_json(value, key)

    def add_as_json(self, val: Any, key: str | None = None, batch_index: int | None = None) -> Output:
        self.content.add(key, to_json(val))
        if not any(name.lower() == "content-type" for name in self.properties):
            self.add_property("content-type", "application/json")
        return self

    def add_as_npz(self, np_list: list[Any], key: str | None = None) -> Output:
        import numpy

        file = io.BytesIO()
        numpy.savez(file, *np_list)
        self.content.add(key, file.getvalue())
        return self

    def add_stream_content(
        self, stream_content: Stream, output_formatter: Callable[[Any], Any] | None = None
    ) -> Output:
        """Send the items one by one. output_formatter: returns the text or bytes of an item.

        Without it, each item is sent as a line of JSON, `{"outputs": item}`.
        """
        self.stream_content, self.stream_formatter = stream_content, output_formatter
        return self


def decode(inputs: Input, content_type: str, key: str | None = None) -> Any:
    """Decode the content as its type says: JSON, text, CSV rows, an image, arrays, or bytes."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/json":
        return inputs.get_as_json(key)
    if kind == "text/csv":
        return inputs.get_as_csv(key)
    if kind.startswith("text/"):
        return inputs.get_as_string(key)
    if kind.startswith("image/"):
        return inputs.get_as_image(key)
    if kind == "tensor/npz":
        return inputs.get_as_npz(key)
    return inputs.get_as_bytes(key)


def encode(outputs: Output, prediction: Any, accept: str | None, key: str | None = None) -> Output:
    """Add a prediction in the format that the client accepts; JSON if that format is not supported."""
    kind = (accept or "").partition(",")[0].partition(";")[0].strip().lower()
    if kind == "tensor/npz":
        outputs.add_property("content-type", kind)
        return outputs.add_as_npz(prediction, key)
    if kind.startswith("text/") and isinstance(prediction, str):
        outputs.add_property("content-type", kind)
        return outputs.add(prediction, key)
    return outputs.add_as_json(prediction, key)


def to_json(value: Any) -> bytes:
    """Return a value as JSON; numpy's numbers and arrays, and points in time, are converted."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, datetime.datetime):
        return str(value)
    if callable(convert := getattr(value, "tolist", None)):
        return convert()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


FORMATTER = "_formats"
"""Attribute of a formatter; its value is "input" or "output"."""


def input_formatter(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function, `f(payload, **kwargs) -> payload`, that changes each request's decoded body."""
    setattr(function, FORMATTER, "input")
    return function


def output_formatter(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function that formats each whole reply, or each event of a stream as text."""
    setattr(function, FORMATTER, "output")
    return function


class Response(dict[str, Any]):
    """A reply whose fields are also attributes, as in vLLM's response objects."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return json.loads(self.model_dump_json())  # type: ignore[no-any-return]

    def model_dump_json(self, **_: Any) -> str:
        return to_json(self).decode()


def response_of(body: bytes) -> Any:
    """Parse a JSON reply into objects whose keys are also attributes."""
    return json.loads(body, object_hook=Response)


def install() -> None:
    """Make `import djl_python` find this module. Only the handler's process calls it."""
    package = ModuleType("djl_python", "The parts of DJL Serving's package that handlers need.")
    package.__path__ = []
    contents: dict[str, dict[str, Any]] = {
        "inputs": {"Input": Input},
        "outputs": {"Output": Output},
        "pair_list": {"PairList": PairList},
        "encode_decode": {"decode": decode, "encode": encode},
        "input_parser": {"input_formatter": input_formatter},
        "output_formatter": {"output_formatter": output_formatter},
    }
    sys.modules["djl_python"] = package
    for name, members in contents.items():
        module = ModuleType(f"djl_python.{name}")
        module.__dict__.update(members)
        setattr(package, name, module)
        sys.modules[module.__name__] = module
    package.__dict__.update(Input=Input, Output=Output, PairList=PairList)
