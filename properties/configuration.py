"""The effective configuration: everything that the user wrote, as one checked object."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from properties.field import TRUE, BackendName, Level
from properties.lmi import PACKAGE, RENAMED, handler_named
from properties.model import (
    LMI_NAME,
    SCRIPTS,
    ModelLocation,
    context_length,
    find_home,
    holds_model,
    locate,
    read_object,
)
from properties.names import KEYS, OPTIONS, PREFIX, key_of
from properties.problem import ConfigurationError, Problem, Report, Source, assigned
from properties.resolution import Resolution, resolve_values
from properties.secure_mode import OPEN, SecureMode, secure_mode
from properties.settings import RETIRED, Settings
from properties.sources import (
    FILE_NAME,
    SGLANG_PREFIX,
    VLLM_PREFIX,
    RawValue,
    read_command_line,
    read_containers,
    read_environment,
    read_file,
)

MODEL_STORE = Path("/opt/ml/model")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
"""Name of one of a model's chat templates; which ones exist is only known from the model's files."""

_MODEL_KEY = key_of("model_id")

_STANDARDS = {
    "CUSTOM_FASTAPI_PING_HANDLER": "/ping says whether the engine, or the model's own handler, can answer",
    "CUSTOM_FASTAPI_MIDDLEWARE_THROTTLE": "job_queue_size and option.max_rolling_batch_size limit requests",
} | dict.fromkeys(
    ("CUSTOM_FASTAPI_MIDDLEWARE_PRE_POST_PROCESS", "CUSTOM_PRE_PROCESS", "CUSTOM_POST_PROCESS"),
    "model.py may have formatters of djl_python, which change requests and replies",
)
"""Variables that AWS's vLLM and SGLang images read (`model-hosting-container-standards`), and what to use instead."""

_PROGRAM = "a handler is model.py, beside the model or in code/, or the file that option.entryPoint names"

_DEFAULTS = Settings()


@dataclass(frozen=True)
class Configuration:
    """What to serve and how.

    Attributes:
        settings: The user's values, and defaults. A default of None or "auto" leaves the choice to the backend.
        sources: Where each option's value comes from.
        warnings: What is doubtful.
        extra: `option.*` names that the schema does not know, without the prefix.
        model_location: The model to serve.
        home: Directory whose serving.properties, model.py and adapters/ are used; None if there is none.
        recommended: Attribute -> value from the model's config.json, where the user set none. It is not in `settings`,
            because a backend may choose less than a recommended value but not less than a requested one.
        backend_options: Those unknown names that vLLM knows: its engine arguments.
        lmi_handler: LMI's own handler named by `option.entryPoint`; then the model's own code is not used.
        vllm_asked_by: Description of the setting of LMI that means vLLM's asynchronous engine.
        secure: What SageMaker's secure mode forbids.
    """

    settings: Settings
    sources: dict[str, Source]
    warnings: list[Problem]
    extra: dict[str, Source] = field(repr=False)
    model_location: ModelLocation
    home: Path | None
    recommended: dict[str, object]
    _written: tuple[RawValue, ...] = field(repr=False)
    _noted: tuple[Problem, ...] = field(repr=False)
    backend_options: frozenset[str] = field(default=frozenset(), repr=False)
    lmi_handler: str | None = None
    vllm_asked_by: str | None = None
    secure: SecureMode = OPEN

    @property
    def extra_texts(self) -> dict[str, str]:
        """The values of `extra`."""
        return {name: item.value for name, item in self.extra.items()}

    @property
    def public_names(self) -> list[str]:
        """The model's names to show to clients; replies use the first. Never a path of this machine."""
        location = self.model_location
        own = location.value if location.kind == "hub" else location.name
        return self.settings.served_model_name or [own]

    @property
    def accepted_names(self) -> frozenset[str]:
        """All names that a route such as /predictions/{model} and, with adapters, a request's `model` may have."""
        return frozenset((*self.public_names, self.model_location.name, LMI_NAME))

    def with_default(self, name: str, value: object) -> Configuration:
        """Give an option another default, which holds where no source sets it."""
        if self.sources[name].level is not Level.DEFAULT:
            return self
        settings = self.settings.model_copy(update={name: value})
        settings.model_fields_set.discard(name)  # the user has not set it
        return replace(self, settings=settings)

    def with_model_config(self, config: Mapping[str, Any]) -> Configuration:
        """Add the context length that the model's config.json states, below everything that the user wrote.

        The type of the weights is not among them: a default of auto leaves it to the backend, which knows the device.
        """
        length = context_length(config)
        if length is None or self.sources["max_model_len"].level < Level.RECOMMENDED:
            return self
        source = Source(Level.RECOMMENDED, "config.json", str(length))
        sources = self.sources | {"max_model_len": source}
        return replace(self, recommended={"max_model_len": length}, sources=sources)

    def with_model_directory(self, directory: Path) -> Configuration:
        """Add what is known once the model has been downloaded to `directory`.

        That is its config.json and, for a model from S3, its serving.properties. One from the hub is not read, because
        its author is not the operator. Raises ConfigurationError, as `resolve` does.
        """
        configuration = self
        if self.model_location.kind == "s3" and (directory / FILE_NAME).is_file():
            report = Report(warnings=[*self._noted])
            written = [*self._written]
            for item in _renamed(read_file(directory / FILE_NAME, report), report):
                if item.key == _MODEL_KEY:
                    report.warn(f"{item.location}: {item.key} is not used: the file lies in the model")
                else:
                    written.append(item)
            if report.problems:
                raise ConfigurationError(report.problems, report.warnings)
            configuration = _build(
                written, report, self.home or directory, self.model_location, self.backend_options, self.secure
            )
        if directory != self.home and (forbidden := list(self.secure.files(directory))):
            raise ConfigurationError(forbidden)
        config = read_model_config(directory)
        return configuration if config is None else configuration.with_model_config(config)

    def of_the_command_line(self) -> list[str]:
        """Return what the command line sets, each as NAME=VALUE."""
        return [f"{item.key}={item.raw}" for item in self._written if item.level is Level.COMMAND_LINE]

    def assigned(self, name: str, value: object = None) -> str:
        """Return how messages show an option's value, or another text in its place."""
        shown = repr(getattr(self.settings, name)) if value is None else value
        return assigned(key_of(name), shown, self.sources[name].location)

    def effective(self, name: str) -> Any:
        """Return an option's value, or the recommended one if the user set none."""
        return self.recommended.get(name, getattr(self.settings, name))

    def unhonoured(self, backend: BackendName) -> list[Problem]:
        """Return a warning for each option that was changed and that this backend does not support."""
        theirs = [
            Problem(f"{PREFIX}{name} ({source.location}) has no effect with the {backend} backend; honoured by: vllm")
            for name, source in self.extra.items()
            if backend != "vllm" and name in self.backend_options
        ]
        honouring = {name: _honouring(name, getattr(self.settings, name)) for name in self.sources}
        reasons = {
            name: f"has no effect with the {backend} backend; honoured by: {', '.join(others) or 'none yet'}"
            for name, others in honouring.items()
            if backend not in others
        }
        return theirs + _warnings(self.settings, self.sources, reasons)

    def without_effect(self, backend: BackendName) -> list[Problem]:
        """Return the same, and a warning for each option that has no effect because of other options."""
        reasons = {
            name: f"has no effect without {key_of(option.needs)}=true"
            for name, option in OPTIONS.items()
            if option.needs and backend in option.backends and not getattr(self.settings, option.needs)
        }
        if self.settings.rolling_batch == "disable":
            reasons["max_rolling_batch_size"] = (
                "has no effect beside option.rolling_batch=disable, which serves one request at a time"
            )
        return self.unhonoured(backend) + _warnings(self.settings, self.sources, reasons)


def _honouring(name: str, value: Any) -> tuple[BackendName, ...]:
    """Return the backends that support an option with this value."""
    option = OPTIONS[name]
    if option.embedded and str(value).lower() not in option.embedded:
        return tuple(backend for backend in option.backends if backend != "rolling")
    return option.backends


def resolve(
    *,
    model: str | None,
    environ: Mapping[str, str],
    options: Sequence[str] = (),
    model_store: Path = MODEL_STORE,
    backend_options: frozenset[str] = frozenset(),
) -> Configuration:
    """Read all sources, without network access and without starting anything.

    Args:
        model: The command line's MODEL: a directory, a hub id or an s3:// URL.
        environ: The environment.
        options: `--option` arguments, each "name=value"; they win over everything else.
        model_store: Directory in which SageMaker puts a model, used if MODEL is not given.
        backend_options: Names that are known in addition to the schema's (see `Configuration`).

    Raises:
        ConfigurationError: Lists all problems.
    """
    report = Report()
    secure = secure_mode(environ, report.problems)
    for name, reason in _STANDARDS.items():
        if environ.get(name):
            report.warn(f"{name} has no effect here: {reason}")
    if environ.get("SAGEMAKER_PROGRAM", "") not in ("", "model.py"):
        report.warn(f"SAGEMAKER_PROGRAM has no effect here: {_PROGRAM}")
    written = [*read_command_line(options, report), *read_environment(environ)]
    written += read_containers(environ, report, backend_options)
    written = _in_the_containers_order(list(_renamed(written, report)), environ, model_store, report)
    report.problems += secure.channel_files()
    named = _first(written, _MODEL_KEY)
    if (several := _first(written, "multi_model")) is not None and several.raw.strip().lower() in TRUE:
        # MODEL, or the store, is the directory that holds the models.
        if named is not None:
            report.warn(f"{named.location} is not used: multi_model serves a directory of models", "model_id")
        if model is not None and not os.path.isdir(model):
            report.problem(f"{model}: with multi_model, MODEL is a directory of models", "model_id")
        place = ModelLocation("directory", str(Path(model or model_store).resolve()), "models")
        kept = [item for item in written if item.key != _MODEL_KEY]
        return _build(kept, report, None, place, backend_options, secure)
    try:
        home = find_home(model, named.raw.strip() if named else None, model_store)
    except ValueError as error:
        report.problem(str(error), "model_id")
        home = None
    if home is not None and (home / FILE_NAME).is_file():
        written += _renamed(read_file(home / FILE_NAME, report), report)
    written += _model_from_place(model, home, written, report)
    report.problems += secure.files(home)
    return _build(written, report, home, None, backend_options, secure)


def read_model_config(directory: Path) -> dict[str, Any] | None:
    """Read a model directory's config.json; None if there is none.

    Raises:
        ConfigurationError: It is not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        return None
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError([Problem(f"the model's config.json cannot be read: {error}")]) from None


def _renamed(written: Iterable[RawValue], report: Report) -> Iterator[RawValue]:
    """Replace old names of options by their current ones."""
    for item in written:
        key = RENAMED.get(item.key)
        if key is not None:
            report.warn(f"{item.location}: {item.key} is deprecated: write {key}", KEYS[key])
        yield item if key is None else replace(item, key=key, name=item.key)


def _in_the_containers_order(
    written: list[RawValue], environ: Mapping[str, str], store: Path, report: Report
) -> list[RawValue]:
    """Drop HF_MODEL_ID where AWS's vLLM and SGLang containers do: they prefer the model in the store."""
    models = [item for item in written if item.key == _MODEL_KEY]
    if not models or not any(name.startswith((VLLM_PREFIX, SGLANG_PREFIX)) for name in environ):
        return written
    first = min(models, key=lambda item: item.level)
    places = [store, *store.glob("*/")]
    if first.level is not Level.DEDICATED or not any(map(holds_model, places)):
        return written
    report.warn(
        f"{first.location} is not used: beside SM_VLLM_* and SM_SGLANG_* variables, the model in {store} comes first",
        "model_id",
    )
    return [item for item in written if item is not first]


def _first(written: Sequence[RawValue], key: str) -> RawValue | None:
    found = [item for item in written if item.key == key]
    return min(found, key=lambda item: item.level) if found else None


def _model_from_place(
    model: str | None, home: Path | None, written: Sequence[RawValue], report: Report
) -> list[RawValue]:
    """Return the model id that follows from MODEL or from the model directory itself."""
    above = _first(written, _MODEL_KEY)
    if model is not None and home is None:
        return [RawValue(Level.COMMAND_LINE, _MODEL_KEY, model, "MODEL")]
    if home is None:
        return []
    if model is not None:
        if above is not None and above.level <= Level.FILE:
            return []
        if above is not None:
            report.warn(f"{above.location} is not used: MODEL names a directory", "model_id")
        return [RawValue(Level.COMMAND_LINE, _MODEL_KEY, str(home), "MODEL")]
    if above is None:
        return [RawValue(Level.DEFAULT, _MODEL_KEY, str(home), str(home))]
    if (home / "config.json").is_file() and Path(above.raw.strip()) != home:
        report.warn(f"the model in {home} is not served: {above.location} names {above.raw.strip()}", "model_id")
    return []


def _build(
    written: Sequence[RawValue],
    report: Report,
    home: Path | None,
    location: ModelLocation | None,
    backend_options: frozenset[str],
    secure: SecureMode,
) -> Configuration:
    result = resolve_values(written, report, backend_options)
    location = location or _locate(result, home)
    _check_together(result, home)
    result.problems += secure.options(result.settings, result.sources, result.extra, result.lmi_handler)
    if not result.settings.multi_model:
        result.warnings += _not_obeyed(result, location, home)
    if result.problems or location is None:
        raise ConfigurationError(result.problems, result.warnings)
    return Configuration(
        result.settings,
        result.sources,
        result.warnings,
        result.extra,
        location,
        home,
        {},
        tuple(written),
        tuple(report.warnings),
        backend_options,
        result.lmi_handler,
        result.vllm_asked_by,
        secure,
    )


def _locate(result: Resolution, home: Path | None) -> ModelLocation | None:
    settings, source = result.settings, result.sources["model_id"]
    if settings.model_id is None:
        if not any(problem.option == "model_id" for problem in result.problems):
            result.problem(
                "no model: give MODEL, set HF_MODEL_ID or OPTION_MODEL_ID, or put one in /opt/ml/model", "model_id"
            )
        return None
    try:
        location = locate(settings.model_id, settings.revision, home)
    except ValueError as error:
        result.problem(f"{assigned(_MODEL_KEY, repr(settings.model_id), source.location)}: {error}", "model_id")
        return None
    custom = settings.entry_point is not None
    if location.kind == "directory" and not custom and not holds_model(Path(location.value)):
        result.problem(f"no model: {location.value} holds neither config.json nor model.py", "model_id")
    return location


def _check_together(result: Resolution, home: Path | None) -> None:
    """Check values against each other and against the files."""
    settings, sources = result.settings, result.sources
    for name in RETIRED:
        if sources[name].level is not Level.DEFAULT:
            message = f"{key_of(name)} ({sources[name].location}) is retired: the model now says so itself"
            result.warn(f"{message}; it is checked against the model and changes nothing", name)

    def written(name: str) -> str:
        value = getattr(settings, name)
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        return assigned(key_of(name), shown, sources[name].location)

    low, high = settings.min_workers, settings.max_workers
    if low is not None and high is not None and low > high:
        result.problem(f"{written('min_workers')} is more than {written('max_workers')}", "min_workers")
    if settings.enable_auto_tool_choice and settings.tool_call_parser is None:
        result.problem(f"{written('enable_auto_tool_choice')} needs option.tool_call_parser", "enable_auto_tool_choice")
    entry = settings.entry_point
    if entry is not None and home is not None and not os.path.isfile(home / entry):
        lmis = f"{PACKAGE}.{entry.removesuffix('.py')}"
        meant = f"; LMI's own handler is written {lmis}" if handler_named(lmis) else ""
        result.problem(f"{written('entry_point')}: no such file in {home}{meant}", "entry_point")
    template = settings.chat_template
    if template is not None and "{" not in template and "\n" not in template and not _NAME.fullmatch(template):
        path = os.path.join(home or "", template)
        if (home is not None or os.path.isabs(path)) and not os.path.isfile(path):
            result.problem(f"{written('chat_template')}: no such file, and no template text", "chat_template")


def _warnings(settings: Settings, sources: Mapping[str, Source], reasons: Mapping[str, str]) -> list[Problem]:
    """Return a warning for each of these options for which the user wrote another value than the default."""
    return [
        Problem(f"{key_of(name)} ({sources[name].location}) {reason}", name)
        for name, reason in reasons.items()
        if sources[name].level < Level.RECOMMENDED and getattr(settings, name) != getattr(_DEFAULTS, name)
    ]


def _not_obeyed(result: Resolution, location: ModelLocation | None, home: Path | None) -> list[Problem]:
    """Return a warning for each setting that no backend will follow; `location` is None if it is unknown."""
    settings, sources = result.settings, result.sources
    reasons: dict[str, str] = {}
    counts = settings.limit_mm_per_prompt
    asked = [name for name, count in counts.items() if name != "image" and count > 0]
    if asked:
        reasons["limit_mm_per_prompt"] = f"allows {' and '.join(asked)}, which is not served: only images are"
    others = sorted(set(settings.media_io_kwargs or {}) - {"image"})
    if others:
        reasons["media_io_kwargs"] = f"says how to read {' and '.join(others)}, which is not served: only images are"
    if location is not None and location.kind != "hub":
        reasons["revision"] = "has no effect: only models of the hub have revisions"
    if location is not None and location.kind != "s3":
        reasons["download_dir"] = "has no effect: only models from s3:// are kept there"
    unseen = location is None or (location.kind == "s3" and home is None)
    if settings.entry_point is None and not unseen and not (home and any((home / name).is_file() for name in SCRIPTS)):
        reasons["handler"] = "has no effect: the model has no model.py, and no entry point is named"
    return _warnings(settings, sources, reasons)
