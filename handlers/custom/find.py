"""Finds out whether a model has its own handler or formatters, and whether they can be imported."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from pathlib import Path

from handlers.errors import InvalidConfiguration
from properties.configuration import Configuration
from properties.model import SCRIPTS
from properties.settings import STANDARD_HANDLER

_OWN_PACKAGES = ("container", "engine", "handlers", "properties")
_BUILT_IN = "djl_python"
_STANDARD_FUNCTION = "custom_sagemaker_invocation_handler"
_STANDARD_DECORATOR = "custom_invocation_handler"
_FORMATTERS = ("input_formatter", "output_formatter")


@dataclass(frozen=True)
class OwnCode:
    """A Python file of the model, with a handler or else with formatters.

    Attributes:
        directory: The model's.
        file: In that directory, as configured.
        function: The handler's name; None for formatters.
        standard: Whether it is written for model-hosting-container-standards (see `worker.adapted`).
        reads: Whether there is a formatter of requests.
        writes: Whether there is one of replies.
    """

    directory: Path
    file: str
    function: str | None = None
    standard: bool = False
    reads: bool = False
    writes: bool = False


def find_code(configuration: Configuration, fetched: Path | None = None) -> OwnCode | None:
    """Return the user's own handler, or else formatters, if there are any.

    model.py counts only if it defines the function or formatters. As in LMI, the function does not count if the entry
    point names one of LMI's own handlers. Code that came from the hub does not count, since its author is not the
    operator. Nothing is run.

    Args:
        configuration: The options.
        fetched: The model's directory, once it is on this machine.
    """
    settings, home = configuration.settings, own_directory(configuration, fetched)
    explicit = settings.entry_point is not None
    if home is None and not explicit:
        return None
    named = configuration.sources["handler"].location == STANDARD_HANDLER
    own = OwnCode(home or Path.cwd(), settings.entry_point or _script(home), settings.handler, named)
    functions = _functions(own.directory / own.file)
    kinds = {name for one in functions for name in map(_decorator, one.decorator_list)} & {*_FORMATTERS}
    if configuration.lmi_handler is None:
        if any(one.name == settings.handler for one in functions):
            return own
        for one in functions:
            if one.name == _STANDARD_FUNCTION or _STANDARD_DECORATOR in map(_decorator, one.decorator_list):
                return replace(own, function=one.name, standard=True)
        if explicit and not kinds:
            return own
    if not kinds:
        return None
    reads, writes = (kind in kinds for kind in _FORMATTERS)
    return OwnCode(own.directory, own.file, reads=reads, writes=writes)


def find_handler(configuration: Configuration, fetched: Path | None = None) -> OwnCode | None:
    """Return the user's own handler, if there is one; see `find_code`."""
    code = find_code(configuration, fetched)
    return None if code is None or code.function is None else code


def find_formatters(configuration: Configuration, fetched: Path | None = None) -> OwnCode | None:
    """Return the user's own formatters, if there are any and no handler; see `find_code`."""
    code = find_code(configuration, fetched)
    return None if code is None or code.function is not None else code


def find_unused(configuration: Configuration, fetched: Path | None = None) -> Path | None:
    """Return a model.py that is not used although its author may think so; see `find_code`."""
    home = own_directory(configuration, fetched)
    if home is None or not (home / _script(home)).is_file():
        return None
    return None if find_code(configuration, fetched) else home / _script(home)


def own_directory(configuration: Configuration, fetched: Path | None) -> Path | None:
    """Return the directory whose code counts; None for a model from the hub alone."""
    if configuration.home is None and configuration.model_location.kind == "s3":
        return fetched
    return configuration.home


def _script(home: Path | None) -> str:
    """model.py, or where SageMaker's SDK packs it."""
    packed = home is not None and not (home / SCRIPTS[0]).is_file() and (home / SCRIPTS[1]).is_file()
    return SCRIPTS[packed]


def _functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    try:
        module = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    return [node for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _decorator(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def refuse_unusable(own: OwnCode) -> None:
    """Raises InvalidConfiguration if the file is missing, or would import the server's modules instead of its own."""
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
