"""How vLLM's engine is built from the configuration: its arguments, and the problems found before it starts."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handlers.backends.vision_flags import contradictions
from handlers.backends.vllm import compat
from handlers.backends.vllm.adapters.directories import adapter_directories
from handlers.backends.vllm.adapters.store import adapter_slots
from handlers.backends.vllm.engine.counters import Counters, stat_logger
from handlers.backends.vllm.failures import refusal_reason
from handlers.backends.vllm.options.arguments import engine_arguments
from handlers.backends.vllm.options.checkpoint import missing_weights
from handlers.backends.vllm.options.plan import choose_devices, share_cores
from handlers.backends.vllm.prompts.constraints import choose_library
from handlers.backends.vllm.samplers.extra_args import offer
from handlers.errors import InvalidConfiguration, ServingError
from properties.problem import ConfigurationError

if TYPE_CHECKING:
    from engine.machine import Machine
    from handlers.backends.vllm.compat import Vllm
    from handlers.backends.vllm.samplers.extra_args import Samplers
    from properties.configuration import Configuration

logger = logging.getLogger(__name__)


class EngineBuilder:
    """Builds engines; all methods block. samplers: those of ours that the engine was given."""

    samplers: Samplers

    def __init__(self, configuration: Configuration, model_path: Path) -> None:
        """Imports vLLM. Raises InvalidConfiguration where it cannot serve this model."""
        from engine.machine import this_machine

        self._configuration = configuration
        self._settings = configuration.settings
        self._path = model_path
        if wrong := contradictions(self._settings, model_path, None):
            raise InvalidConfiguration("; ".join(wrong))
        if reason := missing_weights(model_path, self._settings.load_format):
            raise InvalidConfiguration(reason)
        self.machine: Machine = this_machine()
        choose_devices(self._settings, len(self.machine.accelerators))
        self.vllm: Vllm = compat.load()
        self.arguments = self._arguments()

    def build(self, tokenizer: Any, counters: Counters) -> Any:
        """An engine. Raises InvalidConfiguration with vLLM's reason when it refuses the configuration."""
        vllm, given = self.vllm, self.arguments
        if not self.machine.accelerators:
            share_cores(
                given["tensor_parallel_size"] * given["pipeline_parallel_size"] * given["data_parallel_size"]
            )
        try:
            made = vllm.AsyncEngineArgs(**given)
            choose_library(made, tokenizer)
            return vllm.AsyncLLM.from_engine_args(
                made,
                usage_context=vllm.server_context,
                stat_loggers=[stat_logger(vllm, counters)],
            )
        except (ConfigurationError, ServingError):
            raise
        except Exception as error:
            raise InvalidConfiguration(
                f"vLLM {vllm.version} cannot serve the model as configured: {refusal_reason(error)}"
            ) from error

    @property
    def home(self) -> Path:
        """What lies beside the configuration, adapters among it."""
        return self._configuration.home or self._path

    @property
    def most_adapters(self) -> int:
        return self._settings.max_cpu_loras or self._settings.max_loras

    @cached_property
    def adapter_directories(self) -> dict[str, Path]:
        """Adapters to load at the start, by their names."""
        found = adapter_directories(self.home) if self._settings.enable_lora else {}
        most = self.most_adapters
        if len(found) > most:
            logger.warning(
                "%d adapters, but option.max_cpu_loras is %d: they will take turns in memory",
                len(found),
                most,
            )
        return found

    def _arguments(self) -> dict[str, Any]:
        arguments = engine_arguments(self.vllm, self._configuration, self._path, self.machine)
        self.samplers = offer(arguments)
        cpu = not self.machine.accelerators
        if self._settings.enable_lora:
            most = max(self.most_adapters, len(self.adapter_directories) if cpu else 0)
            arguments |= adapter_slots(arguments, most, cpu=cpu)
        return arguments
