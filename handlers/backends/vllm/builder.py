"""Builds vLLM's engine from the configuration, after checking what can be checked before it starts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from engine.machine import this_machine
from handlers.backends.vision_flags import contradictions
from handlers.backends.vllm import compat
from handlers.backends.vllm.adapters import adapter_directories, adapter_slots
from handlers.backends.vllm.arguments import engine_arguments
from handlers.backends.vllm.checkpoint import missing_weights
from handlers.backends.vllm.counters import Counters, stat_logger
from handlers.backends.vllm.devices import choose_devices, share_cores
from handlers.backends.vllm.failures import refusal_reason
from handlers.backends.vllm.samplers import offer
from handlers.backends.vllm.sampling import choose_library
from handlers.errors import InvalidConfiguration, ServingError
from properties.configuration import Configuration
from properties.problem import ConfigurationError

logger = logging.getLogger(__name__)


class EngineBuilder:
    """Builds engines. Everything here blocks.

    Attributes:
        arguments: For `AsyncEngineArgs`.
        samplers: Those of ours that the engines have.
        adapter_directories: The adapters to load at the start, by their names.
        most_adapters: How many adapters there may be.
        home: The directory of the model's own adapters/.
    """

    def __init__(self, configuration: Configuration, model_path: Path) -> None:
        """Import vLLM. Raises InvalidConfiguration if it cannot serve this model."""
        settings = configuration.settings
        if wrong := contradictions(settings, model_path, None):
            raise InvalidConfiguration("; ".join(wrong))
        if reason := missing_weights(model_path, settings.load_format):
            raise InvalidConfiguration(reason)
        self.machine = this_machine()
        choose_devices(settings, len(self.machine.accelerators))
        self.vllm = compat.load()
        self.arguments = engine_arguments(self.vllm, configuration, model_path, self.machine)
        self.samplers = offer(self.arguments)
        self.home = configuration.home or model_path
        self.most_adapters = settings.max_cpu_loras or settings.max_loras
        self.adapter_directories: dict[str, Path] = {}
        if settings.enable_lora:
            self.adapter_directories = adapter_directories(self.home)
            count, cpu = len(self.adapter_directories), not self.machine.accelerators
            if count > self.most_adapters:
                logger.warning(
                    "%d adapters, but option.max_cpu_loras is %d: they will take turns in memory",
                    count,
                    self.most_adapters,
                )
            self.arguments |= adapter_slots(
                self.arguments, max(self.most_adapters, count if cpu else 0), cpu=cpu
            )

    def build(self, tokenizer: Any, counters: Counters) -> Any:
        """Return an `AsyncLLM`. Raises InvalidConfiguration with vLLM's reason if it refuses the configuration."""
        vllm, given = self.vllm, self.arguments
        if not self.machine.accelerators:
            share_cores(
                given["tensor_parallel_size"] * given["pipeline_parallel_size"] * given["data_parallel_size"]
            )
        try:
            arguments = vllm.AsyncEngineArgs(**given)
            choose_library(arguments, tokenizer)
            return vllm.AsyncLLM.from_engine_args(
                arguments, usage_context=vllm.server_context, stat_loggers=[stat_logger(vllm, counters)]
            )
        except (ConfigurationError, ServingError):
            raise
        except Exception as error:
            raise InvalidConfiguration(
                f"vLLM {vllm.version} cannot serve the model as configured: {refusal_reason(error)}"
            ) from error
