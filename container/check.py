"""`lmi check`: show what would be served and how, without loading the model."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from container.config import SERVE_DEFAULTS, configured, unreadable
from engine.machine import Machine, this_machine
from handlers.artefacts.error import ArtefactError
from handlers.artefacts.fetch import here
from handlers.backends.base import Backend
from handlers.backends.model_files import model_findings
from handlers.backends.select import Choice, backend_of, choose_for
from handlers.backends.vllm.options.fields import SECRET
from handlers.custom.find import find_formatters, find_handler, refuse_unusable
from handlers.errors import InvalidConfiguration
from handlers.model_names import public_names
from handlers.parsers.names import parser_problems
from properties.configuration import Configuration, read_model_config
from properties.field import Level
from properties.names import key_of
from properties.problem import DEFAULT, MASK, ConfigurationError, Problem

_WIDEST = 72


def run_check(
    model: str | None,
    options: Sequence[str],
    as_json: bool,
    environ: Mapping[str, str],
    *,
    everything: bool = False,
) -> int:
    """Run `lmi check [MODEL] [--option NAME=VALUE] [--json] [--all]`, which prints to standard output.

    Returns:
        The exit status: 0, or 1 on an error.
    """
    try:
        configuration = configured(model, options, environ, SERVE_DEFAULTS)
    except ConfigurationError as error:
        _print({"errors": _texts(error.problems), "warnings": _texts(error.warnings)}, as_json)
        return 1
    return check(configuration, as_json=as_json, everything=everything)


def check(
    configuration: Configuration, *, as_json: bool, machine: Machine | None = None, everything: bool = False
) -> int:
    """Print the verdict, the problems, what would be served and what was set; return the exit status.

    Args:
        configuration: The options.
        as_json: Print JSON.
        everything: Print defaults, too.
        machine: What the estimate is compared with; None for this one.
    """
    report = describe(configuration, machine or this_machine())
    _print(report, as_json, everything)
    return 1 if report["errors"] else 0


def describe(configuration: Configuration, machine: Machine) -> dict[str, Any]:
    """Return what `lmi check --json` prints.

    Returns:
        The keys errors, warnings, model, backend, memory, prompts, handler, formatters, options and extra. Sizes are in
        bytes. backend, memory and prompts are None if they are unknown because of an error or because the model is not
        on this machine yet; prompts is also None with vLLM, which has a processor of its own.
    """
    errors: list[Problem] = []
    directory, final = None, False
    location = configuration.model_location
    try:
        directory, final = here(location, configuration.settings)
        if directory is not None:
            configuration = configuration.with_model_directory(directory)
    except ArtefactError as error:
        errors.append(Problem(str(error), "model_id"))
    except (ConfigurationError, OSError) as error:
        errors += [unreadable(error)] if isinstance(error, OSError) else error.problems
        directory = None
    config = None if directory is None else read_model_config(directory)
    warnings = list(configuration.warnings)
    own = find_handler(configuration, directory)
    choice = _choose(configuration, config or {}, machine, errors) if own is None else None
    backend = None if choice is None else backend_of(choice.backend)
    errors = parser_problems(configuration, backend) + errors
    if choice is not None:
        warnings += configuration.without_effect(choice.backend)
    memory = prompts = None
    formatters = find_formatters(configuration, directory)
    if (code := own or formatters) is not None:
        try:
            refuse_unusable(code)
        except InvalidConfiguration as error:
            errors.append(Problem(error.message, "entry_point"))
    if backend is not None and directory is not None:
        found = model_findings(configuration, directory, backend)
        warnings += found.warnings
        if found.errors and not final:
            found.errors = [_of_a_copy(problem) for problem in found.errors]
            warnings += found.errors
        else:
            errors += found.errors
        warnings += backend.format_warnings(configuration, directory)
        if not found.errors:
            memory, prompts = _as_the_start_finds(
                configuration, directory, config or {}, backend, machine, errors, warnings
            )
    elif backend is not None:
        errors += backend.refused_options(configuration, None, machine)
    return {
        "errors": _texts(errors),
        "warnings": _texts(warnings),
        "model": {
            **asdict(location),
            "served_as": public_names(configuration),
            "directory": None if directory is None else str(directory),
            "home": None if configuration.home is None else str(configuration.home),
        },
        "backend": None if choice is None else asdict(choice),
        "memory": memory,
        "prompts": prompts,
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


def _of_a_copy(problem: Problem) -> Problem:
    return Problem(f"the copy in the cache, which the start brings up to date: {problem}", problem.option)


def _as_the_start_finds(
    configuration: Configuration,
    directory: Path,
    config: Mapping[str, Any],
    backend: Backend,
    machine: Machine,
    errors: list[Problem],
    warnings: list[Problem],
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Add what the files alone do not show: the memory estimate and `prompts`, from the code that a start runs."""
    from handlers.backends.fit import fit  # imports torch, which the other reports do not need

    facts = backend.prompt_facts(configuration, directory, machine)
    warnings += facts.warnings
    errors += facts.errors
    if facts.errors:
        return None, None
    estimate = fit(configuration, backend, directory, config, machine)
    errors += estimate.errors
    warnings += estimate.warnings
    if not errors:
        errors += backend.refused_options(configuration, directory, machine)
    prompts = {"template": facts.template, "image_tokens": facts.image_tokens}
    return estimate.numbers(), None if facts.template is None else prompts


def _choose(
    configuration: Configuration, config: Mapping[str, Any], machine: Machine, errors: list[Problem]
) -> Choice | None:
    try:
        return choose_for(configuration, config, len(machine.accelerators))
    except ConfigurationError as error:
        errors += error.problems
        return None


def effective_options(configuration: Configuration) -> dict[str, dict[str, Any]]:
    """Return the value and the source of each option, by its key. Secrets are masked.

    Returns:
        For each key: value, source, location, and whether it was given (neither recommended nor a default).
    """
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


def _print(report: Mapping[str, Any], as_json: bool, everything: bool = False) -> None:
    text = json.dumps(report, indent=2) if as_json else "\n".join(_lines(report, everything))
    sys.stdout.write(text + "\n")


def _lines(report: Mapping[str, Any], everything: bool) -> list[str]:
    """Return the verdict, the problems, what would be served and what was set, as lines."""
    lines = [
        _verdict(report),
        *(f"error: {text}" for text in report["errors"]),
        *(f"warning: {text}" for text in report["warnings"]),
    ]
    if "options" not in report:
        return lines
    model, options = report["model"], report["options"]
    lines += ["", f"model    {model['value']} ({model['kind']}), served as {', '.join(model['served_as'])}"]
    if model["directory"] not in (None, model["value"]):
        lines.append(f"files    {model['directory']}")
    lines.append(f"address  {options['host']['value']}:{options['port']['value']}")
    if report["backend"] is not None:
        lines.append(f"backend  {report['backend']['backend']}: {report['backend']['reason']}")
    if report["handler"] is not None:
        lines.append(f"handler  {report['handler']}: the model's own, which answers instead of an engine")
    if report["formatters"] is not None:
        lines.append(f"formatters in {report['formatters']}: they change requests or replies")
    lines += [f"memory   {text}" for text in _memory(report["memory"], model)]
    if report["prompts"] is not None:
        lines.append(f"chat template: {report['prompts']['template']}")
        tokens = report["prompts"]["image_tokens"] or {}
        told = (f"{size}: {count}" for size, count in tokens.items() if count is not None)
        lines += [f"tokens of an image: {', '.join(told)}"] if tokens else []
    return [*lines, "", *_options(options, report["extra"], everything)]


def _verdict(report: Mapping[str, Any]) -> str:
    errors, warnings = (_counted(len(report[kind]), kind[:-1]) for kind in ("errors", "warnings"))
    if report["errors"]:
        return f"{errors}, {warnings}: this cannot be served"
    if "model" in report and report["model"]["directory"] is None:
        return f"{errors}, {warnings} before the model is downloaded"
    return f"{errors}, {warnings}: this can be served"


def _counted(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def _options(
    options: Mapping[str, Mapping[str, Any]], extra: Mapping[str, Mapping[str, Any]], everything: bool
) -> list[str]:
    """Return the options that were given or that the model recommends; the others only if everything is wanted."""
    rows = []
    ordered = sorted(options.items(), key=lambda item: not item[1]["given"])
    for name, row in ordered:
        if everything or row["source"] != DEFAULT.kind:
            where = row["location"] if row["given"] else row["source"]
            rows.append((name, _shown(row["value"]), where))
    for name, row in extra.items():
        known = "unknown" if row["value"] == MASK else "vLLM's"
        rows.append((f"option.{name}", _shown(row["value"]), f"{row['location']} ({known})"))
    left = len(options) + len(extra) - len(rows)
    table = _table([("option", "value", "source"), *rows]) if rows else []
    return table if not left else [*table, f"{left} options have their defaults: --all shows them"]


def _table(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{name:<{first}}  {value:<{second}}  {source}".rstrip() for name, value, source in rows]


def _shown(value: Any) -> str:
    if value is None or value in ("", [], {}, ()):
        return "-"
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."


def _memory(memory: Mapping[str, Any] | None, model: Mapping[str, Any]) -> list[str]:
    if memory is None:
        return ["unknown" if model["directory"] else "unknown until the model has been downloaded"]
    lines = [
        f"replicas: {memory['copies']}, devices per replica: {memory['devices_per_copy']} "
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
    if memory["image_bytes"] is not None:
        lines.append(f"{_size(memory['image_bytes'])} more for each image of a running request")
    return lines


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
