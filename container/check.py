"""`lmi check`: show what would be served and how, without loading the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from container.check_report import print_report
from container.config import SERVE_DEFAULTS, configured, unreadable
from engine.machine import Machine, this_machine
from handlers.artefacts import ArtefactError
from handlers.artefacts.fetch import here
from handlers.backends.backend import Backend
from handlers.backends.instances import Instance
from handlers.backends.model_files import model_findings
from handlers.backends.select import Choice, backend_of, choose_for
from handlers.backends.vllm.compat import SECRET
from handlers.build import parser_problems
from handlers.custom.find import find_formatters, find_handler, refuse_unusable
from handlers.errors import InvalidConfiguration
from properties.configuration import Configuration, read_model_config
from properties.field import Level
from properties.names import key_of
from properties.problem import MASK, ConfigurationError, Problem


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
        print_report({"errors": _texts(error.problems), "warnings": _texts(error.warnings)}, as_json)
        return 1
    if not instances:
        return check(configuration, as_json=as_json, everything=everything)
    if len(instances) == 1:
        (instance,) = instances
        report = {**describe(configuration, instance.machine), "instance": _facts(instance)}
    else:
        report = compare(configuration, instances)
    print_report(report, as_json, everything)
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
    print_report(report, as_json, everything)
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
