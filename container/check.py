"""`lmi check`: show what would be served and how, without loading the model."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from engine.machine import Machine, this_machine
from handlers.backends.mistral_format import format_problems
from handlers.backends.select import Choice, choose_for
from handlers.backends.vision_flags import contradictions, wanted
from handlers.backends.vllm.options.arguments import refused_options
from handlers.backends.vllm.options.fields import SECRET, engine_argument_names
from handlers.backends.vllm.options.mistral import format_warnings
from handlers.custom.find import find_formatters, find_handler, refuse_unusable
from handlers.errors import InvalidConfiguration
from handlers.parsers.names import parser_problems
from properties.configuration import Configuration, read_model_config, resolve
from properties.field import Level
from properties.names import key_of
from properties.problem import MASK, ConfigurationError, Problem

_WIDEST = 72


def run_check(model: str | None, options: Sequence[str], as_json: bool, environ: Mapping[str, str]) -> int:
    """Resolve and check: the whole of `lmi check [MODEL] [--option NAME=VALUE] [--json]`.

    Prints to standard output; returns the exit status: 0, or 1 on an error.
    """
    try:
        configuration = resolve(
            model=model, environ=environ, options=options, backend_options=engine_argument_names()
        )
    except ConfigurationError as error:
        _print({"errors": _texts(error.problems), "warnings": _texts(error.warnings)}, as_json)
        return 1
    return check(configuration, as_json=as_json)


def check(configuration: Configuration, *, as_json: bool, machine: Machine | None = None) -> int:
    """Print the effective configuration, the backend and the memory estimate; return the exit status.

    machine: what to measure the estimate against; None looks at this one.
    """
    report = describe(configuration, machine or this_machine())
    _print(report, as_json)
    return 1 if report["errors"] else 0


def describe(configuration: Configuration, machine: Machine) -> dict[str, Any]:
    """What `lmi check --json` prints: errors, warnings, model, backend, memory, handler,
    formatters, options, extra.

    Sizes are in bytes. backend and memory are None where an error, or a model that is not on this machine
    yet, leaves them unknown.
    """
    errors: list[Problem] = []
    config: dict[str, Any] | None = None
    location = configuration.model_location
    directory = Path(location.value) if location.kind == "directory" else None
    if directory is not None:
        try:
            config = read_model_config(directory)
            if config is not None:
                configuration = configuration.with_model_config(config)
        except ConfigurationError as error:
            errors += error.problems
    warnings = list(configuration.warnings)
    own = find_handler(configuration, directory)
    choice = _choose(configuration, config or {}, machine, errors) if own is None else None
    errors = parser_problems(configuration, None if choice is None else choice.backend) + errors
    if choice is not None:
        warnings += configuration.without_effect(choice.backend)
    memory = None
    formatters = find_formatters(configuration, directory)
    if (code := own or formatters) is not None:
        try:
            refuse_unusable(code)
        except InvalidConfiguration as error:
            errors.append(Problem(error.message, "entry_point"))
    if directory is None and choice is not None and choice.backend == "vllm":
        errors += refused_options(configuration, None, machine)
    if directory is not None and choice is not None:
        errors += format_problems(directory)
    if directory is not None and config is not None and choice is not None:
        from container.fit import fit  # brings torch and transformers, which the other reports do without

        found = fit(configuration, choice.backend, directory, config, machine)
        errors += found.errors
        warnings += found.warnings
        memory = found.numbers()
        if choice.backend == "vllm":
            warnings += format_warnings(configuration)
            if not errors:
                errors += refused_options(configuration, directory, machine)
        errors += _contradictions(configuration, directory, choice)
    return {
        "errors": _texts(errors),
        "warnings": _texts(warnings),
        "model": {
            **asdict(location),
            "home": None if configuration.home is None else str(configuration.home),
        },
        "backend": None if choice is None else asdict(choice),
        "memory": memory,
        "handler": None if own is None else own.file,
        "formatters": None if formatters is None else formatters.file,
        "options": effective_options(configuration),
        "extra": {
            name: {
                "value": item.value if name in configuration.backend_options - SECRET else MASK,
                "source": item.source.kind,
                "location": item.source.location,
            }
            for name, item in configuration.extra.items()
        },
    }


def _contradictions(configuration: Configuration, directory: Path, choice: Choice) -> list[Problem]:
    """What old picture options say that the model does not."""
    settings = configuration.settings
    if not wanted(settings):
        return []
    from engine.errors import ModelLoadError
    from engine.loader import load_preprocessor

    preprocessor = None
    if choice.backend == "rolling":
        try:
            preprocessor = load_preprocessor(
                str(directory), settings.mm_processor_kwargs, settings.image_processor_backend
            )
        except (ModelLoadError, OSError, ValueError) as error:
            return [Problem(f"the model's picture processor cannot be loaded: {error}")]
    return [Problem(text) for text in contradictions(settings, directory, preprocessor)]


def _choose(
    configuration: Configuration, config: Mapping[str, Any], machine: Machine, errors: list[Problem]
) -> Choice | None:
    try:
        return choose_for(configuration, config, len(machine.accelerators))
    except ConfigurationError as error:
        errors += error.problems
        return None


def effective_options(configuration: Configuration) -> dict[str, dict[str, Any]]:
    """Key -> value, source, location, and whether it was given (not recommended, no default). Secrets are
    masked."""
    rows = {}
    for name, source in configuration.sources.items():
        value = configuration.effective(name)
        rows[key_of(name)] = {
            "value": MASK if isinstance(value, SecretStr) else value,
            "source": source.kind,
            "location": source.location,
            "given": source.level < Level.RECOMMENDED,
        }
    return rows


def _texts(problems: Sequence[Problem]) -> list[str]:
    return [str(problem) for problem in problems]


def _print(report: Mapping[str, Any], as_json: bool) -> None:
    text = json.dumps(report, indent=2) if as_json else "\n".join(_lines(report))
    sys.stdout.write(text + "\n")


def _lines(report: Mapping[str, Any]) -> list[str]:
    lines = []
    if "options" in report:
        rows = [("option", "value", "source")]
        ordered = sorted(report["options"].items(), key=lambda item: not item[1]["given"])
        for name, row in ordered:
            where = row["location"] if row["given"] else row["source"]
            rows.append((name, _shown(row["value"]), where))
        for name, row in report["extra"].items():
            known = "unknown" if row["value"] == MASK else "vLLM's"
            rows.append((f"option.{name}", _shown(row["value"]), f"{row['location']} ({known})"))
        lines += [*_table(rows), ""]
        model = report["model"]
        lines.append(f"model    {model['value']} ({model['kind']}), served as {model['name']}")
        if report["backend"] is not None:
            lines.append(f"backend  {report['backend']['backend']}: {report['backend']['reason']}")
        if report["handler"] is not None:
            lines.append(f"handler  {report['handler']}: the model's own, which answers instead of an engine")
        if report["formatters"] is not None:
            lines.append(f"formatters in {report['formatters']}: they change requests or replies")
        lines += [f"memory   {text}" for text in _memory(report["memory"], model["kind"])]
        lines.append("")
    lines += [f"warning: {text}" for text in report["warnings"]]
    lines += [f"error: {text}" for text in report["errors"]]
    if not report["errors"]:
        lines.append("no errors")
    return lines


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{name:<{first}}  {value:<{second}}  {source}".rstrip() for name, value, source in rows]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."


def _memory(memory: Mapping[str, Any] | None, kind: str) -> list[str]:
    if memory is None:
        return ["unknown" if kind == "directory" else "unknown until the model has been downloaded"]
    lines = [
        f"copies of the model: {memory['copies']}, devices per copy: {memory['devices_per_copy']} "
        f"({memory['device']}, {_size(memory['device_memory'])}), {memory['dtype']}",
        f"computing in {memory['dtype']}: {memory['dtype_reason']}",
    ]
    if memory["devices"]:
        machines = "this machine" if memory["machines"] == 1 else f"{memory['machines']} machines"
        lines.append(f"devices needed: {memory['devices_needed']}, there: {memory['devices']} on {machines}")
    if memory["weights"] is not None:
        lines.append(
            f"weights {_size(memory['weights'])} ({memory['weights_basis']}), "
            f"{_size(memory['weights_per_device'])} per device"
        )
    if memory["cache_per_device"] is not None:
        lines.append(f"key/value cache {_size(memory['cache_per_device'])} per device")
    if memory["cache_tokens"] is not None:
        lines.append(
            f"room for {memory['cache_tokens']} tokens, {memory['cache_bytes_per_token']} bytes each"
        )
    return lines


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
