"""The embedded engine before it is started: what it says of a model and a machine, and which processes it would run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.config import EngineConfig, Vocabulary
from engine.errors import ModelLoadError
from engine.families.registry import family_of, kind_of, served
from handlers.backends.base import DevicePlan, Needs, PromptCheck
from handlers.backends.model_files import Findings, no_processor, too_long
from handlers.backends.select import remedy
from handlers.backends.unused import unused_by_text, unused_on
from handlers.backends.vision_flags import contradictions, wanted
from handlers.backends.weight_files import engine_weight_problems
from handlers.errors import InvalidConfiguration
from properties.model import context_length, model_dtype
from properties.problem import Problem

if TYPE_CHECKING:
    from engine.machine import Machine
    from handlers.backends.rolling.engine import RollingEngine
    from properties.configuration import Configuration
    from properties.problem import Problem
    from properties.settings import Settings


class RollingBackend:
    """See `handlers.backends.base.Backend`."""

    tool_parsers: frozenset[str] = frozenset()
    reasoning_parsers: frozenset[str] = frozenset()
    takes_engine_arguments = False

    def build(self, configuration: Configuration, model_path: Path) -> RollingEngine:
        """See `Backend`."""
        from handlers.backends.rolling.engine import RollingEngine

        return RollingEngine(configuration, model_path)

    def part(self, configuration: Configuration, model_path: Path) -> None:
        """Each engine is on one machine alone."""

    def examine(
        self,
        found: Findings,
        configuration: Configuration,
        directory: Path,
        config: Mapping[str, Any],
        contents: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """See `Backend`."""
        found.add(_unserved(config, directory))
        found.errors += too_long(configuration, context_length(config))
        family = family_of(str(config.get("model_type")))
        sees = family is not None and family.preprocessor is not None
        there = (directory / "preprocessor_config.json").is_file()
        there = there or "image_processor" in contents.get("processor_config.json", {})
        if sees and not there and not configuration.settings.trust_remote_code:
            found.add(iter([no_processor(directory)]))

    def weight_problems(
        self, settings: Settings, directory: Path, config: Mapping[str, Any]
    ) -> Iterator[str]:
        """See `Backend`."""
        pickled, named = settings.load_format.lower() == "pt", config.get("transformers_weights")
        return engine_weight_problems(directory, pickled=pickled, named=named)

    def chat_template(self, config: Mapping[str, Any]) -> object:
        """See `Backend`."""
        family = family_of(str(config.get("model_type")))
        return None if family is None or family.preprocessor is None else family.preprocessor.chat_template

    def plan(self, configuration: Configuration, machine: Machine, shapes: Mapping[str, Any]) -> DevicePlan:
        """See `Backend`."""
        settings, accelerators = configuration.settings, len(machine.accelerators)
        engines = plan_engines(settings, "", accelerators)
        return DevicePlan(
            len(engines),
            engines[0].tensor_parallel_degree,
            accelerators,
            warnings=unused_devices(settings, engines, accelerators),
        )

    def estimate(
        self, configuration: Configuration, directory: Path, config: Mapping[str, Any], machine: Machine
    ) -> Needs:
        """See `Backend`. Imports torch and transformers."""
        from transformers import PretrainedConfig

        from engine.loader import read_config, resolve_dtype
        from handlers.backends.estimate import DTYPE_BYTES, completed, shared_output

        device = "cuda" if machine.accelerators else "cpu"
        resolved = resolve_dtype(
            PretrainedConfig(dtype=model_dtype(config)),
            configuration.settings.dtype,
            device,
            bfloat16=machine.computes_bfloat16(),
        )
        dtype = str(resolved.dtype).removeprefix("torch.")
        shapes = completed(directory, config)
        try:
            read = read_config(str(directory))
        except ModelLoadError as error:
            return Needs(dtype, resolved.reason, shapes, errors=[Problem(str(error), "model_id")])
        family = family_of(kind_of(read))
        assert family is not None, "read_config refuses others"
        layout = family.model.cache_layout(read)
        width = DTYPE_BYTES[dtype]
        return Needs(
            dtype,
            resolved.reason,
            shapes,
            layout.token_values * width,
            layout.image_values * width or None,
            0 if machine.accelerators else shared_output(shapes, dtype),
            warnings=unused_by_text(configuration.settings) if family.preprocessor is None else (),
        )

    def format_warnings(self, configuration: Configuration, directory: Path) -> list[Problem]:
        """See `Backend`."""
        return []

    def refused_options(
        self, configuration: Configuration, directory: Path | None, machine: Machine
    ) -> list[Problem]:
        """See `Backend`: those of the embedded engine are all read by `properties`."""
        return []

    def check_prompts(self, configuration: Configuration, directory: Path, machine: Machine) -> PromptCheck:
        """See `Backend`. Imports torch and transformers where old options about images are to be compared."""
        from handlers.backends.rolling.model_front import IMAGE_SIZES, ModelFront

        settings = configuration.settings
        if problems := _contradictions(settings, directory):
            return PromptCheck(errors=problems)
        if settings.trust_remote_code:
            return PromptCheck()
        try:
            plan_engines(settings, str(directory), len(machine.accelerators))
            front = ModelFront.load(settings, str(directory))
        except (InvalidConfiguration, ModelLoadError) as error:
            return PromptCheck(errors=[Problem(str(error))])
        sizes = {f"{width}x{height}": front.image_tokens(width, height) for width, height in IMAGE_SIZES}
        length = configuration.effective("max_model_len")
        images = settings.limit_mm_per_prompt.get("image", 1)
        crowded = None if length is None else front.crowded(images, settings.max_image_pixels, length)
        return PromptCheck(
            front.template,
            None if front.preprocessor is None else sizes,
            warnings=[] if crowded is None else [Problem(crowded, "limit_mm_per_prompt")],
        )


def _unserved(config: Mapping[str, Any], directory: Path) -> Iterator[str]:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        yield f"config.json in {directory} names no model_type: complete the download, or name another model"
    elif family_of(model_type) is None:
        yield (
            f"model type {model_type!r} is not served by the embedded engine, which serves {served()}; "
            f"{remedy(config.get('architectures') or [])}"
        )


def _contradictions(settings: Settings, directory: Path) -> list[Problem]:
    """Return which old options about images contradict the model."""
    if not wanted(settings):
        return []
    from engine.loader import load_preprocessor

    try:
        preprocessor = load_preprocessor(
            str(directory), settings.mm_processor_kwargs, settings.image_processor_backend
        )
    except (ModelLoadError, OSError, ValueError) as error:
        return [Problem(f"the model's image processor cannot be loaded: {error}")]
    return [Problem(text) for text in contradictions(settings, directory, preprocessor)]


def plan_engines(
    settings: Settings, model_path: str, accelerators: int, vocabulary: Vocabulary | None = None
) -> list[EngineConfig]:
    """Return one config for each replica. vocabulary: for constrained answers.

    With accelerators, there are as many replicas as tensor_parallel_degree fits into the devices, but at most
    max_workers. Without, there are max_workers replicas (1 by default) of tensor_parallel_degree processes (`max` is
    1).

    Raises:
        InvalidConfiguration: There are too few devices.
    """
    devices = _devices(settings.load_on_devices, accelerators)
    degree = settings.tensor_parallel_degree
    if devices:
        ranks = len(devices) if degree == "max" else degree
        if ranks > len(devices):
            raise InvalidConfiguration(
                f"option.tensor_parallel_degree is {ranks}, but {len(devices)} devices are there; lower it or set max"
            )
        groups = [tuple(devices[at : at + ranks]) for at in range(0, len(devices) - ranks + 1, ranks)]
        groups = groups[: settings.max_workers or len(groups)]
    else:
        ranks = 1 if degree == "max" else degree
        workers = settings.max_workers or settings.min_workers or 1
        groups = [("cpu",) * ranks] * workers
    cache = settings.kv_cache_memory_mb
    encoder_cache = settings.encoder_cache_mb
    return [
        EngineConfig(
            model_path=model_path,
            dtype=settings.dtype,
            devices=group,
            max_model_len=settings.max_model_len,
            max_num_seqs=1 if settings.rolling_batch == "disable" else settings.max_rolling_batch_size,
            max_num_batched_tokens=settings.max_rolling_batch_prefill_tokens,
            max_step_seconds=settings.max_step_ms / 1000,
            block_size=settings.block_size,
            kv_cache_bytes=None if cache is None else cache << 20,
            cpu_share=1.0 / len(groups),
            gpu_memory_utilization=settings.gpu_memory_utilization,
            encoder_cache_bytes=None if encoder_cache is None else encoder_cache << 20,
            enable_prefix_caching=settings.enable_prefix_caching,
            pickled_weights=settings.load_format.lower() == "pt",
            vocabulary=vocabulary,
        )
        for group in groups
    ]


def unused_devices(settings: Settings, plan: Sequence[EngineConfig], accelerators: int) -> list[Problem]:
    """Return a warning for each option about devices that has no effect in this plan."""
    usable = len(_devices(settings.load_on_devices, accelerators))
    return unused_on(settings, usable, len(plan), plan[0].tensor_parallel_degree, memory=True)


def _devices(wanted: Sequence[int] | Literal["*"], accelerators: int) -> list[str]:
    """Return torch's names of the accelerators to use; empty on a machine without any."""
    if not accelerators:
        return []
    numbers = range(accelerators) if wanted == "*" else wanted
    for number in numbers:
        if number >= accelerators:
            raise InvalidConfiguration(
                f"load_on_devices names {number}, but the devices are 0 to {accelerators - 1}"
            )
    return [f"cuda:{number}" for number in numbers]
