"""The one place that imports vLLM: every name of it that is used here, wherever its version keeps it.

Modules move between vLLM's versions more than signatures change, so a name that has moved gets a second place
in this file, and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from handlers.errors import InvalidConfiguration

OLDEST, BEFORE = (0, 28), (0, 34)
"""The supported range: from the first, below the second."""

_RANGE = f"vllm>={OLDEST[0]}.{OLDEST[1]},<{BEFORE[0]}.{BEFORE[1]}"
INSTALL = f"install {_RANGE} (pip install '{_RANGE}')"

_ENVIRONMENT = {
    # A forked child would inherit the threads of the front; vLLM's own command sets the same.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # Nothing about an operator's model is sent anywhere unless the operator says so.
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Vllm:
    """What is used of one installed vLLM. Types are Any: vLLM is not there when ours are checked.

    client_errors: what a request did wrong. busy_errors: what a full queue answers (none before 0.29).
    model_class: a ModelConfig -> the class of the model.
    server_context: what vLLM's own server says it is; the size of a step depends on it (8,192 tokens on an H100, 2,048
    for who does not say).
    """

    version: str
    AsyncEngineArgs: Any
    AsyncLLM: Any
    ArgumentParser: Any
    SamplingParams: Any
    StructuredOutputsParams: Any
    RequestOutputKind: Any
    LoRARequest: Any
    TokenizeParams: Any
    StatLoggerBase: Any
    EngineDeadError: type[Exception]
    EngineGenerateError: type[Exception]
    client_errors: tuple[type[Exception], ...]
    busy_errors: tuple[type[Exception], ...]
    parse_model_prompt: Callable[..., Any]
    model_class: Callable[..., Any]
    prometheus_registry: Callable[[], Any]
    server_context: Any

    @property
    def refusals(self) -> tuple[type[Exception], ...]:
        """What vLLM raises for a bad request: its own errors, and Python's where it has not moved to them."""
        return (*self.client_errors, ValueError, TypeError, OverflowError)


def installed_version() -> str | None:
    """The version of the installed vLLM, without importing it; None where there is none."""
    spec = find_spec("vllm")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        try:
            text = Path(place, "_version.py").read_text("utf-8")
        except OSError:
            continue
        for line in text.splitlines():
            name, equals, value = line.partition("= '")
            if equals and name.split("=")[0].strip() == "__version__":
                return value.rstrip("'\n")
    return None


def check_version(version: str | None) -> None:
    """Raise InvalidConfiguration, saying what to install, unless the version is one that is supported."""
    if version is None:
        raise InvalidConfiguration(f"vLLM is not installed: {INSTALL}, or set option.rolling_batch=rolling")
    numbers = version.split(".")[:2]
    if not all(part.isdecimal() for part in numbers) or not OLDEST <= tuple(map(int, numbers)) < BEFORE:
        raise InvalidConfiguration(
            f"vLLM {version} is installed, which this server is not made for: {INSTALL}"
        )


@cache
def load() -> Vllm:
    """Import vLLM: seconds. Raises InvalidConfiguration when it is absent, too old, too new or broken."""
    version = installed_version()
    check_version(version)
    assert version is not None
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return _names(version)
    except (ImportError, AttributeError, OSError) as error:
        raise InvalidConfiguration(
            f"vLLM {version} cannot be imported ({error}): {INSTALL} with the torch that it names"
        ) from error


def _names(version: str) -> Vllm:
    # vllm's package must come first: it sets up the environment for all the others.
    find("vllm", "__version__")
    return Vllm(
        version=version,
        AsyncEngineArgs=find("vllm.engine.arg_utils", "AsyncEngineArgs"),
        AsyncLLM=find("vllm.v1.engine.async_llm", "AsyncLLM"),
        ArgumentParser=find("vllm.utils.argparse_utils", "FlexibleArgumentParser"),
        SamplingParams=find("vllm.sampling_params", "SamplingParams"),
        StructuredOutputsParams=find("vllm.sampling_params", "StructuredOutputsParams"),
        RequestOutputKind=find("vllm.sampling_params", "RequestOutputKind"),
        LoRARequest=find("vllm.lora.request", "LoRARequest"),
        TokenizeParams=find("vllm.renderers.params vllm.renderers", "TokenizeParams"),
        StatLoggerBase=find("vllm.v1.metrics.loggers", "StatLoggerBase"),
        EngineDeadError=find("vllm.v1.engine.exceptions vllm.exceptions", "EngineDeadError"),
        EngineGenerateError=find("vllm.v1.engine.exceptions vllm.exceptions", "EngineGenerateError"),
        client_errors=(find("vllm.exceptions", "VLLMClientError"),),
        busy_errors=tuple(
            error for error in [find("vllm.exceptions", "GracefulHTTPError", None)] if error is not None
        ),
        parse_model_prompt=find("vllm.renderers.inputs.preprocess vllm.inputs", "parse_model_prompt"),
        model_class=find(
            "vllm.model_executor.model_loader.utils vllm.model_executor.model_loader", "get_model_cls"
        ),
        prometheus_registry=find("vllm.v1.metrics.prometheus", "get_prometheus_registry"),
        server_context=find("vllm.usage.usage_lib", "UsageContext").OPENAI_API_SERVER,
    )


@dataclass(frozen=True)
class VllmParsing:
    """What is used of vLLM to read answers with its own parsers."""

    ParserManager: Any
    ChatCompletionRequest: Any
    get_cached_tokenizer: Callable[[Any], Any]


@cache
def load_parsing() -> VllmParsing:
    """Apart from `load`, as most servers do without. Raises InvalidConfiguration like it."""
    version = load().version
    try:
        return VllmParsing(
            ParserManager=find("vllm.parser vllm.parser.parser_manager", "ParserManager"),
            ChatCompletionRequest=find(
                "vllm.entrypoints.openai.chat_completion.protocol vllm.entrypoints.openai.protocol",
                "ChatCompletionRequest",
            ),
            get_cached_tokenizer=find("vllm.tokenizers.hf vllm.tokenizers", "get_cached_tokenizer"),
        )
    except (ImportError, AttributeError, OSError) as error:
        raise InvalidConfiguration(f"the parsers of vLLM {version} cannot be imported: {error}") from error


def registered_names() -> dict[str, Collection[str]]:
    """What may be named where vLLM's command line takes any text, plugins' own included: argument -> names."""
    find("vllm.plugins", "load_general_plugins")()
    quantizations = find("vllm.model_executor.layers.quantization", "QUANTIZATION_METHODS")
    loaders = find("vllm.model_executor.model_loader", "_LOAD_FORMAT_TO_MODEL_LOADER")
    tokenizers = find("vllm.tokenizers.registry vllm.tokenizers", "TokenizerRegistry").tokenizers
    return {"quantization": quantizations, "load_format": loaders, "tokenizer_mode": {"auto", *tokenizers}}


def cpu_takes_block_size(tokens: int) -> bool:
    """Whether the attention kernel for CPUs can do with blocks of so many tokens."""
    backend = find("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackend")
    return bool(backend.supports_block_size(tokens))


def logits_processor() -> Any:
    """The class that the older model runner's logits processors extend."""
    return find("vllm.v1.sample.logits_processor", "LogitsProcessor")


def newer_logits_processor() -> Any:
    """The newer runner's; None in versions whose newer runner takes none."""
    return find("vllm.v1.worker.gpu.sample.logits_processor", "LogitsProcessor", None)


def process_dict_updates() -> Callable[..., bool]:
    """What keeps a dictionary of rows in step with the older runner's batch."""
    return find("vllm.v1.sample.logits_processor", "process_dict_updates")  # type: ignore[no-any-return]


@dataclass(frozen=True)
class RunnerRoom:
    """What the newer model runner has room for, in one request. More is an error there that ends the engine.

    stop_token_ids: those that min_tokens holds off, the model's own ends among them. bad_words, bad_word_tokens: as
    vLLM spells them, up to two runs of tokens for a word.
    """

    allowed_token_ids: int
    logit_bias: int
    stop_token_ids: int
    bad_words: int
    bad_word_tokens: int


def runner_room(vllm_config: Any) -> RunnerRoom | None:
    """None where the older runner serves, which has room for all."""
    return _newer_runner_room() if getattr(vllm_config, "use_v2_model_runner", True) else None


@cache
def _newer_runner_room() -> RunnerRoom:
    bias, environment = "vllm.v1.worker.gpu.sample.logit_bias", "vllm.envs"
    return RunnerRoom(
        allowed_token_ids=find(bias, "MAX_NUM_ALLOWED_TOKEN_IDS", 1024),
        logit_bias=find(bias, "MAX_NUM_LOGIT_BIAS_TOKENS", 1024),
        stop_token_ids=find(bias, "MAX_NUM_STOP_TOKEN_IDS", 128),
        bad_words=find(environment, "VLLM_MAX_NUM_BAD_WORDS", 128),
        bad_word_tokens=find(environment, "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS", 1024),
    )


def multiproc_executor() -> Any:
    """The class that runs the workers of one machine."""
    return find("vllm.v1.executor.multiproc_executor", "MultiprocExecutor")


_REQUIRED = object()


def find(places: str, name: str, default: Any = _REQUIRED) -> Any:
    """A name from the first of several modules (separated by spaces) that has it.

    Raises ImportError when none has and there is no default.
    """
    reason: Exception | None = None
    for place in places.split():
        try:
            return getattr(import_module(place), name)
        except (ImportError, AttributeError) as error:
            reason = reason or error
    if default is not _REQUIRED:
        return default
    raise ImportError(f"{name} is in none of {places}") from reason
