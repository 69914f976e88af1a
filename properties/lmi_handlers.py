"""Settings of LMI that have a meaning together: its own handlers, its asynchronous mode and its dynamic batching.

LMI writes `rolling_batch=disable` in two senses. Alone, requests run one after the other; together with its
asynchronous mode or an asynchronous handler, the engine batches by itself, so LMI's own queue must not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from properties.names import key_of
from properties.problem import Problem
from properties.sources import RawValue
from properties.values import TRUE

PACKAGE = "djl_python"

_TENSORRT = "TensorRT-LLM is not served here; vLLM or the embedded engine takes its place"
_DEEPSPEED = "LMI removed DeepSpeed; vLLM or the embedded engine takes its place"
_FASTER = "LMI removed FasterTransformer; vLLM or the embedded engine takes its place"
_NEURON = "Neuron devices are not served here; vLLM or the embedded engine takes its place"
_NO_LANGUAGE = "this server generates text, and runs no models of other kinds"


@dataclass(frozen=True)
class LmiHandler:
    """A module of LMI that `option.entryPoint` may name.

    Attributes:
        vllm: It runs vLLM.
        asynchronous: It batches by itself, whatever rolling_batch says.
        note: Why something else serves instead.
        refused: Nothing here can replace it.
    """

    vllm: bool = False
    asynchronous: bool = False
    note: str | None = None
    refused: bool = False


HANDLERS = {
    "lmi_vllm": LmiHandler(vllm=True, asynchronous=True),
    "huggingface": LmiHandler(note="the server's own backends answer"),
    "rolling_batch": LmiHandler(note="the server's own backends answer"),
    "lmi_trtllm": LmiHandler(asynchronous=True, note=_TENSORRT),
    "tensorrt_llm": LmiHandler(note=_TENSORRT),
    "tensorrt_llm_python": LmiHandler(note=_TENSORRT),
    "deepspeed": LmiHandler(note=_DEEPSPEED),
    "fastertransformer": LmiHandler(note=_FASTER),
    "transformers_neuronx": LmiHandler(note=_NEURON),
    "transformersneuronx": LmiHandler(note=_NEURON),
    "stable_diffusion_inf2": LmiHandler(note=_NO_LANGUAGE, refused=True),
    "sklearn_handler": LmiHandler(note=_NO_LANGUAGE, refused=True),
    "xgboost_handler": LmiHandler(note=_NO_LANGUAGE, refused=True),
}
"""The part after `djl_python.` -> its handler."""

_ALIASES = {
    "transformers-neuronx": "transformers_neuronx",
    "stable-diffusion": "stable_diffusion_inf2",
    "async_service": "lmi_vllm",
}

REPLACED_BECAUSE = {
    "trtllm": _TENSORRT,
    "tensorrtllm": _TENSORRT,
    "deepspeed": _DEEPSPEED,
    "fastertransformer": _FASTER,
    "tnx": _NEURON,
}
"""Old value of rolling_batch or engine -> why another one is used."""


@dataclass
class Meaning:
    """The combined meaning of LMI's settings.

    Attributes:
        values: Option -> the value that counts.
        handler: LMI's own handler, if one was named.
        asked_by: Description of the setting that requests vLLM.
        used: Settings that have an effect here, although they have none alone.
    """

    values: dict[str, RawValue]
    handler: str | None = None
    asked_by: str | None = None
    used: tuple[RawValue, ...] = ()


def taken_together(
    values: Mapping[str, RawValue],
    ignored: Collection[RawValue],
    problems: list[Problem],
    warnings: list[Problem],
) -> Meaning:
    """Combine the settings that LMI combines.

    Args:
        values: The value of each option.
        ignored: Settings that have no effect alone.
        problems: Receives what is wrong.
        warnings: Receives what is doubtful.
    """
    meaning = Meaning(dict(values))
    module = _built_in(meaning, problems, warnings)
    cause = values["entry_point"] if module is not None and module.asynchronous else _switched_on(values)
    if cause is not None and (module is None or module.vllm):
        meaning.asked_by = _told(cause)
    batching = values.get("rolling_batch")
    if batching is None or batching.raw != "disable":
        return meaning
    size = _dynamic_batch(ignored)
    if cause is not None:
        meaning.values["rolling_batch"] = replace(
            batching, raw="auto", location=f"{batching.location}, beside {_told(cause)}"
        )
    elif size is not None:
        meaning.used = (size,)
        meaning.values["rolling_batch"] = replace(
            batching, raw="rolling", location=f"{batching.location}, beside {_told(size)}"
        )
        most = replace(size, key=key_of("max_rolling_batch_size"), raw=size.raw.strip(), name=size.key)
        meaning.values.setdefault("max_rolling_batch_size", most)
    return meaning


def handler_named(entry_point: str) -> LmiHandler | None:
    """Return LMI's own handler of that name; None if there is none."""
    package, _, rest = entry_point.partition(".")
    name = rest.partition(".")[0].lower()
    return HANDLERS.get(_ALIASES.get(name, name)) if package == PACKAGE else None


def _built_in(meaning: Meaning, problems: list[Problem], warnings: list[Problem]) -> LmiHandler | None:
    """Remove one of LMI's own handlers from the values: it is not a file of the model."""
    written = meaning.values.get("entry_point")
    if written is None or written.raw.partition(".")[0] != PACKAGE:
        return None
    del meaning.values["entry_point"]
    described = f"{key_of('entry_point')} = {written.raw!r} ({written.location})"
    module = handler_named(written.raw)
    if module is None:
        known = ", ".join(f"{PACKAGE}.{name}" for name, one in HANDLERS.items() if not one.refused)
        problems.append(
            Problem(f"{described}: not a handler of LMI's; allowed: a Python file, or {known}", "entry_point")
        )
    elif module.refused:
        problems.append(Problem(f"{described}: {module.note}", "entry_point"))
    else:
        meaning.handler = written.raw
        if module.note is not None:
            warnings.append(Problem(f"{described} is deprecated: {module.note}", "entry_point"))
    return module


def _switched_on(values: Mapping[str, RawValue]) -> RawValue | None:
    mode = values.get("async_mode")
    return mode if mode is not None and mode.raw.lower() in TRUE else None


def _dynamic_batch(ignored: Collection[RawValue]) -> RawValue | None:
    """Return LMI's batch_size, if several requests may share a batch."""
    sizes = [
        item
        for item in ignored
        if item.key.removeprefix("option.") in ("batch_size", "max_dynamic_batch_size")
        and item.raw.strip() not in ("0", "1")
    ]
    return min(sizes, key=lambda item: (item.level, item.key), default=None)


def _told(item: RawValue) -> str:
    return f"{item.key} = {item.raw.strip()} ({item.location})"
