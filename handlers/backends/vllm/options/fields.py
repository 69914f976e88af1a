"""Names that the installed vLLM knows, read from its source without importing it."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

SECRET = frozenset({"hf_token"})
"""Fields whose value is never shown."""

_REGISTERS = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
"""vLLM's tables of architectures that generate."""

_CLASSES = ("EngineArgs", "AsyncEngineArgs")


@cache
def architectures() -> frozenset[str]:
    """What the installed vLLM lists as able to generate; empty where there is none or its list cannot be read."""
    statements = _source("model_executor", "models", "registry.py")
    return frozenset[str]().union(*(_keys(statements, table) for table in _REGISTERS))


@cache
def engine_argument_names() -> frozenset[str]:
    """Every `AsyncEngineArgs` field of the installed vLLM; empty where there is none.

    They are options here: `option.<name>`. Milliseconds instead of the seconds that the import takes, so that an
    unknown option can be told at once, whichever backend serves.
    """
    return frozenset(
        item.target.id
        for node in _source("engine", "arg_utils.py")
        if isinstance(node, ast.ClassDef) and node.name in _CLASSES
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and not item.target.id.startswith("_")
    )


@cache
def tool_parser_names() -> frozenset[str]:
    """The tool parsers that the installed vLLM registers; empty where there is none."""
    return _keys(_source("tool_parsers", "__init__.py"), "_TOOL_PARSERS_TO_REGISTER")


@cache
def reasoning_parser_names() -> frozenset[str]:
    """The same of reasoning parsers."""
    return _keys(_source("reasoning", "__init__.py"), "_REASONING_PARSERS_TO_REGISTER")


def _keys(statements: list[ast.stmt], table: str) -> frozenset[str]:
    """The keys of a module's table."""
    return frozenset(
        str(key.value)
        for node in statements
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id == table
        for key in node.value.keys
        if isinstance(key, ast.Constant)
    )


def _source(*path: str) -> list[ast.stmt]:
    """The statements of a file of the installed vLLM; none where it cannot be read."""
    spec = find_spec("vllm")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        try:
            return ast.parse(Path(place, *path).read_bytes()).body
        except (OSError, SyntaxError, ValueError):
            continue
    return []
