"""What `lmi check` prints: its report as JSON, as lines, or as lines of a terminal's width with colours."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from handlers.backends.select import vllm_installed
from handlers.progress import size_text
from properties.problem import DEFAULT, MASK

_WIDEST = 72
_NO_BREAK = "\N{NO-BREAK SPACE}"
_ALIGNED = (32, 20)
"""The greatest widths of the columns of names and of values; longer texts exceed them."""
_COLUMN = re.compile(r"(error|warning): |\S+ {2,}|instance | +")
_ROWS = ("model", "files", "address", "backend", "instance", "handler", "formats", "memory", "prompts", "option")
"""What lines of the report begin with."""
_EMBEDDED = "vLLM is not installed here: this is what the embedded engine needs, also where vLLM would serve"


def print_report(report: Mapping[str, Any], as_json: bool, everything: bool = False) -> None:
    """Print a report of `container.check` to standard output. everything: print defaults, too."""
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
