"""Resolves what the user wrote to one value per option: precedence, names, types, and everything that is wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, get_args
from urllib.parse import urlsplit

from pydantic import ValidationError

from properties.field import TRUE, Level
from properties.lmi import REPLACED_BECAUSE, SILENT, TRUE_MEANS, Meaning, ignored_because, taken_together
from properties.names import KEYS, OPTIONS, PREFIX, key_of, nearest
from properties.problem import DEFAULT, MASK, Report, Source, assigned
from properties.settings import Settings
from properties.sources import RawValue
from properties.types import Allowed
from properties.vllm_arguments import VLLM_ABSENT, VLLM_ARGUMENTS


@dataclass
class Resolution(Report):
    """The result, complete or not; an option named by `problems` has its default. See also `Configuration`."""

    settings: Settings = field(default_factory=Settings)
    sources: dict[str, Source] = field(default_factory=dict)
    extra: dict[str, Source] = field(default_factory=dict)
    lmi_handler: str | None = None
    vllm_asked_by: str | None = None


def resolve_values(written: Iterable[RawValue], report: Report, backend_options: Collection[str] = ()) -> Resolution:
    """Choose, convert and check. Nothing is raised: every problem is collected, after those of the report."""
    result = Resolution([*report.problems], [*report.warnings])
    candidates: dict[str, list[RawValue]] = defaultdict(list)
    ignored: list[RawValue] = []
    unknown: list[RawValue] = []
    for item in _expanded(written, result):
        if item.key in KEYS:
            candidates[KEYS[item.key]].append(item)
        elif ignored_because(item.key) is not None:
            ignored.append(item)
        elif not (item.level is Level.ENVIRONMENT and item.key in SILENT):
            unknown.append(item)
    chosen = {name: _choose(name, items, result) for name, items in candidates.items()}
    values = {name: item for name, item in chosen.items() if item is not None}
    meaning = taken_together(values, ignored, result)
    for item in ignored:
        if item not in meaning.used:
            result.warn(f"{item.location}: {item.key} has no effect here: {ignored_because(item.key)}")
    _validate(meaning, result)
    _report_unknown(unknown, result, backend_options)
    result.sources = {name: result.sources.get(name, DEFAULT) for name in OPTIONS}
    return result


def allowed(name: str) -> str:
    """Describe what an option accepts."""
    field = Settings.model_fields[name]
    for part in (*field.metadata, *_parts(field.annotation)):
        if isinstance(part, Allowed):
            return part.text
        if part is bool:
            return "true or false"
        choices = get_args(part)
        if choices and all(isinstance(choice, str) for choice in choices):
            return ", ".join(choices)
    return "text"


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and all that it is made of, metadata first."""
    yield annotation
    for part in (*getattr(annotation, "__metadata__", ()), *get_args(annotation)):
        yield from _parts(part)


def _expanded(written: Iterable[RawValue], result: Resolution) -> Iterator[RawValue]:
    """Split what stands for several options, and replace what stands for another."""
    for item in written:
        if item.key == "inference_address":
            yield from _address(item, result)
        elif item.key in TRUE_MEANS:
            name, value, instead = TRUE_MEANS[item.key]
            result.warn(
                f"{item.location}: {item.key} is deprecated and stands for {key_of(name)}={value}: write {instead}",
                name,
            )
            if item.raw.strip().lower() in TRUE:
                yield replace(item, key=key_of(name), raw=value)
        else:
            yield item


def _address(item: RawValue, result: Resolution) -> Iterator[RawValue]:
    host = port = None
    try:
        url = urlsplit(item.raw.strip())
        if url.scheme == "http":
            host, port = url.hostname, url.port
    except ValueError:
        host = None
    if host is None:
        result.problem(f"{assigned(item.key, repr(item.raw.strip()), item.location)}: allowed: http://HOST:PORT")
        return
    yield replace(item, key="host", raw=host, rank=1)
    if port is not None:
        yield replace(item, key="port", raw=str(port), rank=1)


def _choose(name: str, items: Sequence[RawValue], result: Resolution) -> RawValue | None:
    """Return the item that counts: of the highest level, then the lowest rank; several of these must agree."""
    best = min((item.level, item.rank) for item in items)
    chosen = [item for item in items if (item.level, item.rank) == best]
    for item in items:
        if item.variable is not None and item.level is best[0] and item.rank > best[1]:
            result.warn(f"{item.location} is not used: {chosen[0].location} wins", name)
    ready = [prepared for item in chosen if (prepared := _prepare(name, item, result)) is not None]
    if len(ready) < len(chosen):
        return None
    if len(ready) > 1 and not _agree(name, ready):
        written = " and ".join(_assigned(item.name or item.key, name, item) for item in ready)
        result.problem(f"{key_of(name)} has two different values: {written}", name)
        return None
    return ready[0]


def _prepare(name: str, item: RawValue, result: Resolution) -> RawValue | None:
    """Strip, convert and translate old spellings of the value; None after a problem."""
    option = OPTIONS[name]
    raw = item.raw if option.verbatim else item.raw.strip()
    if item.variable is not None:
        if item.variable.instead is not None:
            result.warn(f"{item.location} is deprecated: write {item.variable.instead}", name)
        try:
            raw = item.variable.convert(raw)
        except ValueError as error:
            result.problem(f"{item.location} = {raw!r}: allowed: {error}", name)
            return None
    if not option.verbatim:
        raw = _words(name).get(raw.lower(), raw)
    meaning = {old.lower(): new for old, new in option.replaced}.get(raw.lower())
    if meaning is not None:
        why = f": {REPLACED_BECAUSE[raw.lower()]}" if raw.lower() in REPLACED_BECAUSE else ""
        written = assigned(key_of(name), repr(raw), item.location)
        result.warn(f"{written} is deprecated: {meaning} is used{why}", name)
        raw = meaning
    return replace(item, raw=raw)


@cache
def _words(name: str) -> dict[str, str]:
    """Return the words that an option may be, by their lower case: `HF_TASK=Text-Generation` is not another value."""
    parts = _parts(Settings.model_fields[name].annotation)
    return {part.lower(): part for part in parts if isinstance(part, str)}


def _agree(name: str, items: Sequence[RawValue]) -> bool:
    """Tell whether texts mean the same value; a text that cannot be read agrees only with equal ones."""
    try:
        values = [getattr(Settings.model_validate({name: item.raw}), name) for item in items]
    except ValidationError:
        return len({item.raw for item in items}) == 1
    return all(value == values[0] for value in values)


def _validate(meaning: Meaning, result: Resolution) -> None:
    chosen, bad = meaning.values, dict[str, str]()
    result.lmi_handler, result.vllm_asked_by = meaning.handler, meaning.asked_by
    try:
        result.settings = Settings.model_validate({name: item.raw for name, item in chosen.items()})
    except ValidationError as failure:
        for error in failure.errors(include_url=False):
            name = str(error["loc"][0])
            own = error["type"] == "value_error"
            bad.setdefault(name, f"{error['msg'].removeprefix('Value error, ')}; " if own else "")
        for name, detail in bad.items():
            result.problem(_bad_value(name, chosen[name], detail), name)
        good = {name: item for name, item in chosen.items() if name not in bad}
        result.settings = Settings.model_validate({name: item.raw for name, item in good.items()})
    result.sources = {
        name: _source(name, item)
        for name, item in chosen.items()
        if name in bad or getattr(result.settings, name) is not None  # None, as of auto, counts as not written
    }


def _bad_value(name: str, item: RawValue, detail: str) -> str:
    hint = " (a comment needs a line of its own)" if item.level is Level.FILE and " #" in item.raw else ""
    written = _assigned(item.name or key_of(name), name, item)
    return f"{written}: {detail}allowed: {allowed(name)}{hint}"


def _report_unknown(unknown: Sequence[RawValue], result: Resolution, backend_options: Collection[str]) -> None:
    """Report each as a warning, or as a problem with strict_options. The value is not shown: it may be a secret."""
    for item in unknown:
        name = item.key.removeprefix(PREFIX) if item.key.startswith(PREFIX) else None
        if name not in backend_options:
            alone = item.level in (Level.ENVIRONMENT, Level.CONTAINER)
            written = item.location if alone else f"{item.key} ({item.location})"
            if name in VLLM_ARGUMENTS and not backend_options:
                reason = f"an option of {VLLM_ABSENT}"
            else:
                known = nearest(item.key, item.level, backend_options)
                reason = f"no such option; did you mean {known}?" if known else "no such option"
            report = result.problem if result.settings.strict_options else result.warn
            report(f"{written}: {reason}")
        if name is not None:
            before = result.extra.get(name)
            if before is None or item.level < before.level:
                result.extra[name] = Source(item.level, item.location, item.raw)


def _source(name: str, item: RawValue) -> Source:
    return Source(item.level, item.location, MASK if OPTIONS[name].secret else item.raw)


def _assigned(key: str, name: str, item: RawValue) -> str:
    """Return how messages show what was written for the option `name`; a secret is masked."""
    return assigned(key, MASK if OPTIONS[name].secret else repr(item.raw), item.location)
