"""The JSON files of a model, read as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, in which Infinity and NaN are numbers.

    transformers writes them, too (`model_max_length`, limits in a config).

    Raises:
        OSError: The file cannot be read.
        ValueError: It does not contain a JSON object.
    """
    try:
        value = json.loads(file.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value
