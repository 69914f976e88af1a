"""What `lmi check` says of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from container.check import describe
from engine.machine import Device, Machine
from properties.configuration import Configuration, resolve

GIB = 2**30
CPU = Machine((), Device("host memory", 8 * GIB))


def report(model: Path, on: Machine, *options: str, **environ: str) -> dict[str, Any]:
    environ = {"OPTION_DTYPE": "bf16", "OPTION_ROLLING_BATCH": "rolling", **environ}
    return describe(resolve(model=str(model), environ=environ, options=options), on)


def configure(model: Path, *options: str) -> Configuration:
    return resolve(model=str(model), environ={}, options=["rolling_batch=rolling", *options])
