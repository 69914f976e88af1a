"""`lmi check`: show what would be served and how, without loading the model."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from container.config import SERVE_DEFAULTS, configured, unreadable
from engine.machine import Machine, this_machine
from handlers.artefacts import ArtefactError
from handlers.artefacts.fetch import here
from handlers.backends.backend import Backend
from handlers.backends.instances import Instance
from handlers.backends.model_files import model_findings
from handlers.backends.select import Choice, backend_of, choose_for, vllm_installed
from handlers.backends.vllm.compat import SECRET
from handlers.build import parser_problems
from handlers.custom.find import find_formatters, find_handler, refuse_unusable
from handlers.errors import InvalidConfiguration
from handlers.progress import size_text
from properties.configuration import Configuration, read_model_config
from properties.field import Level
from properties.names import key_of
from properties.problem import DEFAULT, MASK, ConfigurationError, Problem

_WIDEST = 72
_NO_BREAK = "\N{NO-BREAK SPACE}"
_ALIGNED = (32, 20)
"""The greatest widths of the columns of names and of values; longer texts exceed them."""
_COLUMN = re.compile(r"(error|warning): |\S+ {2,}|instance | +")
_ROWS = (
    "model",
    "files",
    "address",
    "backend",
    "instance",
    "handler",
    "formats",
    "memory",
    "prompts",
    "option",
)
"""What lines of the report begin with."""
_EMBEDDED = "vLLM is not installed here: this is what the embedded engine needs, also where vLLM would serve"


def run_check(
    model: str | None,
    options: Sequence[str],
    as_json: bool,
    environ: Mapping[str, str],
    *,
    everything: bool = False,
    instances: Sequence[Instance] = (),
) -> int:
    """Run `lmi check [MODEL] [--option NAME=VALUE] [--json] [--all] [--instance NAME]`; it prints to standard output.

    Returns:
        The exit status: 0, or 1 on an error; with several instances 1 if the model fits none of them.
    """
    try:
        configuration = configured(model, options, environ, SERVE_DEFAULTS)
    except ConfigurationError as error:
        _print({"errors": _texts(error.problems), "warnings": _texts(error.warnings)}, as_json)
        return 1
    if not instances:
        return check(configuration, as_json=as_json, everything=everything)
    if len(instances) == 1:
        (instance,) = instances
        report = {**describe(configuration, instance.machine), "instance": _facts(instance)}
    else:
        report = compare(configuration, instances)
    _print(report, as_json, everything)
    return 1 if report["errors"] else 0


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
        The keys errors, warnings, model, backend, instance, memory, prompts, handler, formatters, options and extra.
        Sizes are in bytes. backend, memory and prompts are None if they are unknown because of an error or because the
        model is not on this machine yet; prompts is also None with vLLM, which has a processor of its own. instance is
        None, because only the caller knows it.
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
            "served_as": configuration.public_names,
            "directory": None if directory is None else str(directory),
            "home": None if configuration.home is None else str(configuration.home),
        },
        "backend": None if choice is None else asdict(choice),
        "instance": None,
        "memory": memory,
        "prompts": prompts,
        "handler": None if own is None else own.file,
        "formatters": None if formatters is None else formatters.file,
        "options": effective_options(configuration),
        "extra": {
            name: {
                "value": item.value if name in configuration.backend_options - SECRET else MASK,
                "source": item.kind,
                "location": item.location,
            }
            for name, item in configuration.extra.items()
        },
    }


def compare(configuration: Configuration, instances: Sequence[Instance]) -> dict[str, Any]:
    """Return what `lmi check --instance all --json` prints.

    Instances that differ only in what the estimate does not look at are measured once.

    Returns:
        The keys errors, warnings and instances. errors are those that all instances have, if the model fits none of
        them; warnings are those that all have.
    """
    reports: dict[tuple[Any, ...], dict[str, Any]] = {}
    found = []
    for instance in instances:
        measured = (instance.gpu, instance.gpus or instance.memory)
        if measured not in reports:
            reports[measured] = describe(configuration, replace(instance.machine, name="the instance"))
        found.append((instance, reports[measured]))
    rows = [_row(instance, report) for instance, report in found]
    errors = []
    if all(row["fits"] is False for row in rows):
        errors = _of_all("errors", reports.values()) or ["the model fits none of these instances"]
    return {"errors": errors, "warnings": _of_all("warnings", reports.values()), "instances": rows}


def _of_all(kind: str, reports: Iterable[Mapping[str, Any]]) -> list[str]:
    first, *others = reports
    return [text for text in first[kind] if all(text in other[kind] for other in others)]


def _row(instance: Instance, report: Mapping[str, Any]) -> dict[str, Any]:
    """Describe one instance. Its `fits` is None if the model's files are not here, or if its own code answers."""
    memory = report["memory"] or {}
    fits = True if memory else None
    length, room = report["options"]["option.max_model_len"]["value"], memory.get("cache_tokens")
    return {
        **_facts(instance),
        "fits": False if report["errors"] else fits,
        "backend": None if report["backend"] is None else report["backend"]["backend"],
        "copies": memory.get("copies"),
        "devices_per_copy": memory.get("devices_per_copy"),
        "max_model_len": min((value for value in (length, room) if value is not None), default=None),
        "cache_tokens": room,
        "errors": report["errors"],
    }


def _facts(instance: Instance) -> dict[str, Any]:
    return {
        "name": instance.name,
        "gpus": instance.gpus,
        "gpu": None if instance.gpu is None else instance.gpu.name,
        "gpu_memory": None if instance.gpu is None else instance.gpu.memory,
        "vcpus": instance.vcpus,
        "host_memory": instance.memory,
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

    prompts = backend.check_prompts(configuration, directory, machine)
    warnings += prompts.warnings
    errors += prompts.errors
    if prompts.errors:
        return None, None
    estimate = fit(configuration, backend, directory, config, machine)
    errors += estimate.errors
    warnings += estimate.warnings
    if not errors:
        errors += backend.refused_options(configuration, directory, machine)
    shown = {"template": prompts.template, "image_tokens": prompts.image_tokens}
    return estimate.numbers(), None if prompts.template is None else shown


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
    if as_json:
        lines = [json.dumps(report, indent=2)]
    elif sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        lines = [_for_terminal(line, width) for line in _lines(report, everything)]
        lines[0] = _colored(lines[0], "1;31" if report["errors"] else "1;33" if report["warnings"] else "1;32")
    else:
        lines = _lines(report, everything)
    sys.stdout.write("\n".join(lines).replace(_NO_BREAK, " ") + "\n")


def _for_terminal(line: str, width: int) -> str:
    """Break a line below its second column, and colour what it begins with."""
    label, space = line.split(" ")[0], _COLUMN.match(line)
    indent = " " * min(0 if space is None else space.end(), width // 2)
    text = textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    color = {"error:": "1;31", "warning:": "1;33"}.get(label, "2" if label in _ROWS else "")
    return _colored(label, color) + text[len(label) :] if color else text


def _colored(text: str, color: str) -> str:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[{color}m{text}\x1b[0m"


def _lines(report: Mapping[str, Any], everything: bool) -> list[str]:
    """Return the verdict, the problems, what would be served and what was set, as lines."""
    lines = [
        _verdict(report),
        *(f"error: {text}" for text in report["errors"]),
        *(f"warning: {text}" for text in report["warnings"]),
    ]
    if "instances" in report:
        return [*lines, "", *_comparison(report["instances"])]
    if "options" not in report:
        return lines
    model, options = report["model"], report["options"]
    lines += ["", f"model    {model['value']} ({model['kind']}), served as {', '.join(model['served_as'])}"]
    if model["directory"] not in (None, model["value"]):
        lines.append(f"files    {model['directory']}")
    lines.append(f"address  {options['host']['value']}:{options['port']['value']}")
    if report["backend"] is not None:
        lines.append(f"backend  {report['backend']['backend']}: {report['backend']['reason']}")
    instance = report["instance"]
    if instance is not None:
        lines += _row_of("instance", _instance(instance, report["backend"]))
    if report["handler"] is not None:
        lines.append(f"handler  {report['handler']}: the model's own, which answers instead of an engine")
    if report["formatters"] is not None:
        lines.append(f"formats  {report['formatters']}: the model's own, which change requests or replies")
    lines += _row_of("memory", _memory(report["memory"], model, instance))
    if report["prompts"] is not None:
        texts = [f"chat template: {report['prompts']['template']}"]
        tokens = report["prompts"]["image_tokens"] or {}
        told = (f"{size}: {count}" for size, count in tokens.items() if count is not None)
        lines += _row_of("prompts", [*texts, *([f"tokens of an image: {', '.join(told)}"] if tokens else [])])
    return [*lines, "", *_options(options, report["extra"], everything)]


def _row_of(label: str, texts: Sequence[str]) -> list[str]:
    return [f"{label if not at else '':<8} {text}" for at, text in enumerate(texts)]


def _verdict(report: Mapping[str, Any]) -> str:
    errors, warnings = (_counted(len(report[kind]), kind[:-1]) for kind in ("errors", "warnings"))
    if "instances" in report:
        fitting = sum(row["fits"] is True for row in report["instances"])
        unknown = any(row["fits"] is None for row in report["instances"])
        told = "unknown where this fits" if unknown else f"this fits {fitting} of {len(report['instances'])} instances"
        return f"{errors}, {warnings}: {told}"
    if report["errors"]:
        return f"{errors}, {warnings}: this cannot be served"
    if "model" in report and report["model"]["directory"] is None:
        return f"{errors}, {warnings} before the model is downloaded"
    return f"{errors}, {warnings}: this can be served"


def _counted(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def _instance(instance: Mapping[str, Any], backend: Mapping[str, Any] | None) -> list[str]:
    lines = [
        f"{instance['name']}: {_gpus(instance)}, {instance['vcpus']} vCPUs, "
        f"{size_text(instance['host_memory'])} of host memory"
    ]
    if instance["gpus"] and backend is not None and not vllm_installed():
        lines.append(_EMBEDDED)
    return lines


def _gpus(instance: Mapping[str, Any]) -> str:
    return (
        f"{instance['gpus']} x {instance['gpu']}, {size_text(instance['gpu_memory'])} each"
        if instance["gpus"]
        else "no GPU"
    )


def _comparison(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the table, with one line for instances that differ only in their host."""
    lines: list[tuple[str, ...]] = [("instance", "devices", "fits", "replicas", "context", "cache tokens")]
    kinds: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        host = None if row["gpus"] else row["name"]
        kinds.setdefault((row["name"].partition(".")[0], row["gpus"], host), []).append(row)
    for first, *others in kinds.values():
        sizes = [other["name"].partition(".")[2] for other in others]
        names = first["name"] + (f" to {sizes[-1]}" if len(sizes) > 1 else "".join(f", {size}" for size in sizes))
        gpu = (first["gpu"] or "").removeprefix("NVIDIA ")
        devices = f"{first['gpus']} x {gpu}" if first["gpus"] else f"CPU, {size_text(first['host_memory'])}"
        replicas = first["copies"] and f"{first['copies']} on {first['devices_per_copy']}"
        facts = [replicas, first["max_model_len"], first["cache_tokens"]]
        told = ["-" if fact is None or not first["fits"] else str(fact) for fact in facts]
        lines.append((names, devices, {True: "yes", False: "no", None: "?"}[first["fits"]], *told))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    assumed = [] if vllm_installed() or rows[0]["backend"] is None else ["", _EMBEDDED]
    return [*table, *assumed, "--instance NAME says why, and more"]


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
    first, second = (min(widest, max(len(row[column]) for row in rows)) for column, widest in enumerate(_ALIGNED))
    # The spaces of a source are those at which a terminal's line is not broken.
    return [
        f"{name:<{first}}  {value:<{second}}  {source.replace(' ', _NO_BREAK)}".rstrip() for name, value, source in rows
    ]


def _shown(value: Any) -> str:
    if value is None or value in ("", [], {}, ()):
        return "-"
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."


def _memory(
    memory: Mapping[str, Any] | None, model: Mapping[str, Any], instance: Mapping[str, Any] | None
) -> list[str]:
    if memory is None:
        return ["unknown" if model["directory"] else "unknown until the model has been downloaded"]
    lines = [
        f"replicas: {memory['copies']}, devices per replica: {memory['devices_per_copy']} "
        f"({memory['device']}, {size_text(memory['device_memory'])})",
        f"computing in {memory['dtype']}: {memory['dtype_reason']}",
    ]
    if memory["devices"]:
        here = "this machine" if instance is None else instance["name"]
        machines = here if memory["machines"] == 1 else f"{memory['machines']} machines"
        lines.append(f"devices needed: {memory['devices_needed']}, there: {memory['devices']} on {machines}")
    if memory["weights"] is not None:
        lines.append(
            f"weights {size_text(memory['weights'])} ({memory['weights_basis']}), "
            f"{size_text(memory['weights_per_device'])} per device"
        )
    if memory["cache_per_device"] is not None:
        lines.append(f"key/value cache {size_text(memory['cache_per_device'])} per device")
    if memory["cache_tokens"] is not None:
        lines.append(f"room for {memory['cache_tokens']} tokens, {memory['cache_bytes_per_token']} bytes each")
    if memory["image_bytes"] is not None:
        lines.append(f"{size_text(memory['image_bytes'])} more for each image of a running request")
    return lines
