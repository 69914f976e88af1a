"""The embedded engine before it is started: what it says of a model and a machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ModelLoadError
from engine.families.registry import family_of, kind_of, served
from handlers.backends.backend import DevicePlan, Findings, Needs, PromptCheck, Starting
from handlers.backends.image_options import contradictions, crowded, image_tokens, unused_by_text, wanted
from handlers.backends.model_files import no_processor, too_long
from handlers.backends.rolling.plan import plan_engines, unused_devices
from handlers.backends.select import remedy
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


IMAGE_SIZES = ((336, 336), (1344, 1344), (1920, 1080))
"""The (width, height) of images whose number of tokens is reported to operators."""


class RollingBackend:
    """See `handlers.backends.backend.Backend`."""

    takes_engine_arguments = False

    def parser_names(self, option: str) -> frozenset[str]:
        return frozenset()

    def build(self, configuration: Configuration, model_path: Path) -> Starting[RollingEngine]:
        from handlers.backends.rolling.engine import RollingEngine

        return partial(RollingEngine.start, configuration, model_path)

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
        found.add(_unserved(config, directory))
        found.errors += too_long(configuration, context_length(config))
        found.warnings += _inexact(configuration.settings)
        family = family_of(str(config.get("model_type")))
        sees = family is not None and family.preprocessor is not None
        there = (directory / "preprocessor_config.json").is_file()
        there = there or "image_processor" in contents.get("processor_config.json", {})
        if sees and not there and not configuration.settings.trust_remote_code:
            found.add([no_processor(directory)])
        pickled = configuration.settings.load_format.lower() == "pt"
        named = config.get("transformers_weights")
        found.add(engine_weight_problems(directory, pickled=pickled, named=named))

    def chat_template(self, config: Mapping[str, Any]) -> object:
        family = family_of(str(config.get("model_type")))
        return None if family is None or family.preprocessor is None else family.preprocessor.chat_template

    def plan(
        self, configuration: Configuration, directory: Path, machine: Machine, shapes: Mapping[str, Any]
    ) -> DevicePlan:
        settings, accelerators = configuration.settings, len(machine.accelerators)
        engines = plan_engines(settings, str(directory), accelerators, machine=machine)
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
        from engine.memory import GRAPHS_RESERVE
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
            # At most: float32 has no kernel for them, and some families have none without xformers.
            graphs=0 if configuration.settings.enforce_eager or dtype == "float32" else GRAPHS_RESERVE,
            warnings=unused_by_text(configuration.settings) if family.preprocessor is None else (),
        )

    def refused_options(self, configuration: Configuration, directory: Path | None, machine: Machine) -> list[Problem]:
        """See `Backend`: those of the embedded engine are all read by `properties`."""
        return []

    def check_prompts(self, configuration: Configuration, directory: Path, machine: Machine) -> PromptCheck:
        """See `Backend`. It starts a process, or with trust_remote_code may import torch and transformers."""
        from handlers.backends.rolling.model_front import ModelFront

        settings = configuration.settings
        if settings.trust_remote_code:  # the front would run the model's own code
            return PromptCheck(errors=_contradictions(settings, directory))
        try:
            plan_engines(settings, str(directory), len(machine.accelerators))
            front = ModelFront.load(settings, str(directory))
        except (InvalidConfiguration, ModelLoadError) as error:
            return PromptCheck(errors=[Problem(str(error))])
        if front.contradictions:
            return PromptCheck(errors=[Problem(text) for text in front.contradictions])
        template, preprocessor = front.text.renderer.templates.described(), front.preprocessor
        if preprocessor is None:
            return PromptCheck(template)
        sizes = {f"{width}x{height}": image_tokens(preprocessor, width, height) for width, height in IMAGE_SIZES}
        length = configuration.effective("max_model_len")
        full = None if length is None else crowded(settings, preprocessor, length)
        return PromptCheck(template, sizes, warnings=[] if full is None else [Problem(full, "limit_mm_per_prompt")])


def _unserved(config: Mapping[str, Any], directory: Path) -> Iterator[str]:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        yield f"config.json in {directory} names no model_type: complete the download, or name another model"
    elif family_of(model_type) is None:
        yield (
            f"model type {model_type!r} is not served by the embedded engine, which serves {served()}; "
            f"{remedy(config.get('architectures') or [])}"
        )


def _inexact(settings: Settings) -> Iterator[Problem]:
    if settings.quantize == "int8":
        yield Problem(
            "option.quantize = 'int8' changes answers: on examples/shapes 97.92 % of 5,396 were right instead of "
            "97.94 %, and 3 differed; measure your own model",
            "quantize",
        )


def _contradictions(settings: Settings, directory: Path) -> list[Problem]:
    """Return which old options about images contradict the model."""
    if not wanted(settings):
        return []
    from engine.loader import load_preprocessor

    try:
        preprocessor = load_preprocessor(str(directory), settings.mm_processor_kwargs, settings.image_processor_backend)
    except (ModelLoadError, OSError, ValueError) as error:
        return [Problem(f"the model's image processor cannot be loaded: {error}")]
    return [Problem(text) for text in contradictions(settings, directory, preprocessor)]
