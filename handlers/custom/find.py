"""Whether a model brings a handler of its own, and whether it can be imported."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from handlers.errors import InvalidConfiguration
from properties.configuration import Configuration

_OWN_PACKAGES = ("container", "engine", "handlers", "properties")
_BUILT_IN = "djl_python"


@dataclass(frozen=True)
class OwnHandler:
    """file: in directory, as configured."""

    directory: Path
    file: str


def find_handler(configuration: Configuration, fetched: Path | None = None) -> OwnHandler | None:
    """The user's own handler, where there is one: model.py counts only if it defines the function.

    fetched: the model's directory, once it is on this machine. Code that came from the hub does not count: its author
    is not the operator. Nothing is run.
    """
    settings, home = configuration.settings, configuration.home
    if home is None and configuration.model_location.kind == "s3":
        home = fetched
    if settings.entry_point is not None:
        return OwnHandler(home or Path.cwd(), settings.entry_point)
    if home is None:
        return None
    try:
        module = ast.parse((home / "model.py").read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    defined = any(isinstance(node, functions) and node.name == settings.handler for node in module.body)
    return OwnHandler(home, "model.py") if defined else None


def refuse_unusable(own: OwnHandler) -> None:
    """Raises InvalidConfiguration for what cannot be imported, or would import something else than is meant."""
    if own.file.startswith(("http:", "https:", _BUILT_IN)) or not (own.directory / own.file).is_file():
        raise InvalidConfiguration(
            f"option.entryPoint = {own.file!r}: no such file in {own.directory}; allowed: a Python file, relative to "
            "the model's directory"
        )
    for name in _OWN_PACKAGES:
        package, module = own.directory / name, own.directory / f"{name}.py"
        if module.is_file() or (package.is_dir() and any(package.glob("*.py"))):
            shown = module.name if module.is_file() else f"{name}/"
            raise InvalidConfiguration(
                f"{shown} beside {own.file} has the name of a package of this server, so an import of {name} would "
                "get the server's: rename it"
            )
