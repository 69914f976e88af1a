"""vLLM before it is started: what it says of a model and a machine."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handlers.backends.backend import DevicePlan, Findings, Needs, PromptCheck, Starting
from handlers.backends.image_options import contradictions
from handlers.backends.model_files import no_processor, too_long
from handlers.backends.vllm.checkpoint import format_warnings, served_dtype, stored_dtype, weight_problems
from handlers.backends.vllm.compat import parser_names
from handlers.backends.vllm.devices import follows, heads_of, plan_devices
from handlers.errors import InvalidConfiguration
from properties.model import context_length
from properties.problem import Problem

if TYPE_CHECKING:
    from engine.machine import Machine
    from handlers.backends.base import Lifecycle
    from handlers.backends.vllm.engine import VllmEngine
    from properties.configuration import Configuration


class VllmBackend:
    """See `handlers.backends.backend.Backend`."""

    takes_engine_arguments = True

    def parser_names(self, option: str) -> frozenset[str]:
        return parser_names(option)

    def build(self, configuration: Configuration, model_path: Path) -> Starting[VllmEngine]:
        from handlers.backends.vllm.engine import VllmEngine

        return partial(VllmEngine.start, configuration, model_path)

    def part(self, configuration: Configuration, model_path: Path) -> Starting[Lifecycle] | None:
        if not follows(configuration.extra_texts):
            return None
        from handlers.backends.vllm.follower import VllmFollower

        return partial(VllmFollower.start, configuration, model_path)

    def examine(
        self,
        found: Findings,
        configuration: Configuration,
        directory: Path,
        config: Mapping[str, Any],
        contents: Mapping[str, Mapping[str, Any]],
    ) -> None:
        names = ("preprocessor_config.json", "processor_config.json")
        there = configuration.settings.trust_remote_code or any((directory / name).is_file() for name in names)
        if "vision_config" in config and not there:
            found.add([no_processor(directory)])
        found.add(weight_problems(directory, configuration.settings.load_format))
        found.warnings += format_warnings(configuration, directory)

    def chat_template(self, config: Mapping[str, Any]) -> object:
        return None

    def plan(
        self, configuration: Configuration, directory: Path, machine: Machine, shapes: Mapping[str, Any]
    ) -> DevicePlan:
        settings, extra, heads = configuration.settings, configuration.extra_texts, heads_of(shapes)
        plan = plan_devices(settings, extra, len(machine.accelerators), heads)
        if plan.problems:
            raise InvalidConfiguration("; ".join(str(problem) for problem in plan.problems))
        return DevicePlan(plan.data, plan.tensor * plan.pipeline, plan.available, plan.machines, plan.warnings)

    def estimate(
        self, configuration: Configuration, directory: Path, config: Mapping[str, Any], machine: Machine
    ) -> Needs:
        """See `Backend`. Imports torch and transformers."""
        from handlers.backends.estimate import completed

        settings = configuration.settings
        bfloat16 = not machine.accelerators or machine.computes_bfloat16()
        dtype, reason = served_dtype(settings.dtype, stored_dtype(directory, config), bfloat16=bfloat16)
        shapes = config if settings.trust_remote_code else completed(directory, config)
        # vLLM can be set to serve more tokens than the model has positions; the embedded engine refuses that.
        warnings = too_long(configuration, context_length(shapes))
        return Needs(dtype, reason, shapes, takes_all=True, encoder_cache=False, warnings=warnings)

    def refused_options(self, configuration: Configuration, directory: Path | None, machine: Machine) -> list[Problem]:
        """See `Backend`. Imports vLLM."""
        from handlers.backends.vllm.arguments import refused_options

        return refused_options(configuration, directory, machine)

    def check_prompts(self, configuration: Configuration, directory: Path, machine: Machine) -> PromptCheck:
        """See `Backend`: vLLM has a processor of its own, which is not asked."""
        wrong = contradictions(configuration.settings, directory, None)
        return PromptCheck(errors=[Problem(text) for text in wrong])
