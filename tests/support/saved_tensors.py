"""Tensors as clients send them, and files that no client should send."""

from __future__ import annotations

import base64
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Planted:
    """Makes a directory where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def saved(thing: Any, **how: Any) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(thing, file, **how)
    return file.getvalue()


def encoded(thing: Any) -> str:
    return base64.b64encode(thing if isinstance(thing, bytes) else saved(thing)).decode()


def part(thing: Any) -> dict[str, Any]:
    """A part of a message: of a tensor, a file, or an object of several."""
    several = isinstance(thing, dict)
    value = {name: encoded(item) for name, item in thing.items()} if several else encoded(thing)
    return {"type": "image_embeds", "image_embeds": value}


def repacked(file: bytes, changed: Callable[[str, bytes], bytes | None], method: int = zipfile.ZIP_STORED) -> bytes:
    """The same archive with other contents: None leaves an entry out."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            if (content := changed(name, old.read(name))) is not None:
                new.writestr(name, content)
    return out.getvalue()


def with_pickle(file: bytes, pickled: bytes) -> bytes:
    return repacked(file, lambda name, old: pickled if name.endswith("/data.pkl") else old)


def bomb(gigabytes: int = 1) -> bytes:
    """A megabyte that says it holds zeros for gigabytes."""
    out = io.BytesIO()
    like = saved(torch.zeros(4, 4))
    with (
        zipfile.ZipFile(io.BytesIO(like)) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for name in old.namelist():
            if not name.endswith("/data/0"):
                new.writestr(name, old.read(name))
                continue
            with new.open(name, "w", force_zip64=True) as entry:
                for _ in range(gigabytes * 64):
                    entry.write(bytes(2**24))
    return out.getvalue()
