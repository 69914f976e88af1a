"""The names of vLLM's engine arguments, read from its source without importing it."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

SECRET = frozenset({"hf_token"})
"""Fields whose value is never shown."""

_CLASSES = ("EngineArgs", "AsyncEngineArgs")


@cache
def engine_argument_names() -> frozenset[str]:
    """Every `AsyncEngineArgs` field of the installed vLLM; empty where there is none.

    They are options here: `option.<name>`. Milliseconds instead of the seconds that the import takes, so that an
    unknown option can be told at once, whichever backend serves.
    """
    spec = find_spec("vllm")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        try:
            tree = ast.parse(Path(place, "engine", "arg_utils.py").read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        return frozenset(
            item.target.id
            for node in tree.body
            if isinstance(node, ast.ClassDef) and node.name in _CLASSES
            for item in node.body
            if isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and not item.target.id.startswith("_")
        )
    return frozenset()
