"""The one file that imports vLLM and knows its internals.

Nothing is imported before `load`: `lmi check` and a server with the embedded engine do not need vLLM.
"""

from __future__ import annotations

import ast
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from handlers.errors import InvalidConfiguration

logger = logging.getLogger(__name__)

OLDEST, BEFORE = (0, 32), (0, 34)
"""The supported range: from the first version, below the second."""

_RANGE = f"vllm>={OLDEST[0]}.{OLDEST[1]},<{BEFORE[0]}.{BEFORE[1]}"
INSTALL = f"install {_RANGE} (pip install '{_RANGE}')"

_ENVIRONMENT = {
    # A forked child would inherit the front end's threads; vLLM's own command does the same.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # Usage statistics are not sent unless the operator asks for it.
    "VLLM_NO_USAGE_STATS": "1",
}

_NAMES = {
    "AsyncEngineArgs": "vllm.engine.arg_utils",
    "AsyncLLM": "vllm.v1.engine.async_llm",
    "EngineDeadError": "vllm.v1.engine.exceptions",
    "EngineGenerateError": "vllm.v1.engine.exceptions",
    "FlexibleArgumentParser": "vllm.utils.argparse_utils",
    "GracefulHTTPError": "vllm.exceptions",
    "LoRARequest": "vllm.lora.request",
    "RequestOutputKind": "vllm.sampling_params",
    "SamplingParams": "vllm.sampling_params",
    "StatLoggerBase": "vllm.v1.metrics.loggers",
    "StructuredOutputsParams": "vllm.sampling_params",
    "TokenizeParams": "vllm.renderers",
    "UsageContext": "vllm.usage.usage_lib",
    "VLLMClientError": "vllm.exceptions",
    "get_model_cls": "vllm.model_executor.model_loader",
    "get_prometheus_registry": "vllm.v1.metrics.prometheus",
    "parse_model_prompt": "vllm.renderers.inputs.preprocess",
}
"""The names that every server uses of vLLM, with their modules."""

_PARSING = {
    "ChatCompletionRequest": "vllm.entrypoints.openai.chat_completion.protocol",
    "ParserManager": "vllm.parser",
    "get_cached_tokenizer": "vllm.tokenizers.hf",
}
"""The names that only its parsers need."""


class Vllm(SimpleNamespace):
    """The names in `_NAMES`, typed Any since vLLM is absent where types are checked, and `version`."""

    @property
    def refusals(self) -> tuple[type[Exception], ...]:
        """The exceptions that vLLM raises for a bad request: its own, and Python's where it still uses them."""
        return (self.VLLMClientError, ValueError, TypeError, OverflowError)

    @property
    def server_context(self) -> Any:
        """The context of vLLM's own server; with another one, a step has 2,048 tokens instead of 8,192 on an H100."""
        return self.UsageContext.OPENAI_API_SERVER


def installed_version() -> str | None:
    """Return the version of the installed vLLM without importing it; None if it is not installed."""
    return next(
        (str(node.value) for node in _assigned("__version__", "_version.py") if isinstance(node, ast.Constant)), None
    )


def check_version(version: str | None) -> None:
    """Raise InvalidConfiguration, saying what to install, unless the version is supported."""
    if version is None:
        raise InvalidConfiguration(f"vLLM is not installed: {INSTALL}, or set option.rolling_batch=rolling")
    numbers = version.split(".")[:2]
    if not all(part.isdecimal() for part in numbers) or not OLDEST <= tuple(map(int, numbers)) < BEFORE:
        raise InvalidConfiguration(f"vLLM {version} is installed, which this server is not made for: {INSTALL}")


@cache
def load() -> Vllm:
    """Import vLLM: seconds. Raises InvalidConfiguration when it is absent, too old, too new or broken."""
    version = installed_version()
    check_version(version)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    remedy = f"{INSTALL} with the torch that it names"
    return Vllm(version=version, **_found(_NAMES, f"vLLM {version} cannot be imported ({{}}): {remedy}"))


@cache
def load_parsing() -> Vllm:
    """Import the names in `_PARSING`, which most servers do not need. Raises InvalidConfiguration like `load`."""
    return Vllm(**_found(_PARSING, f"the parsers of vLLM {load().version} cannot be imported: {{}}"))


def _found(names: dict[str, str], failure: str) -> dict[str, Any]:
    try:
        import_module("vllm")  # imported first, because it sets up the environment for the other modules
        return {name: _find(module, name) for name, module in names.items()}
    except (ImportError, AttributeError, OSError) as error:
        raise InvalidConfiguration(failure.format(error)) from error


def _find(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


def registered_names() -> dict[str, Collection[str]]:
    """Return the allowed names of arguments that vLLM's command line does not check, including those of plugins."""
    _find("vllm.plugins", "load_general_plugins")()
    return {
        "quantization": _find("vllm.model_executor.layers.quantization", "QUANTIZATION_METHODS"),
        "load_format": _find("vllm.model_executor.model_loader", "_LOAD_FORMAT_TO_MODEL_LOADER"),
        "tokenizer_mode": {"auto", *_find("vllm.tokenizers.registry", "TokenizerRegistry").tokenizers},
    }


def cpu_takes_block_size(tokens: int) -> bool:
    """Whether the attention kernel for CPUs supports blocks of so many tokens."""
    backend = _find("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackend")
    return bool(backend.supports_block_size(tokens))


def logits_processor_classes() -> tuple[Any, Any]:
    """Return the classes named LogitsProcessor of the older and of the newer model runner."""
    return (
        _find("vllm.v1.sample.logits_processor", "LogitsProcessor"),
        _find("vllm.v1.worker.gpu.sample.logits_processor", "LogitsProcessor"),
    )


def process_dict_updates() -> Callable[..., bool]:
    """Return vLLM's function that keeps a dictionary of rows in step with the older runner's batch."""
    return _find("vllm.v1.sample.logits_processor", "process_dict_updates")  # type: ignore[no-any-return]


class RunnerRequests:
    """What the newer model runner keeps of its requests, by their index in its batch (LogitsProcRequestState)."""

    def __init__(self, states: Any) -> None:
        self._states = states

    def is_prefilled(self, place: int, length: int) -> bool:
        """Whether so many tokens are at least the whole prompt."""
        return length >= int(self._states.prefill_len.np[place])

    def tokens(self, place: int, length: int) -> tuple[list[int], list[int]]:
        """Return the tokens of prompt and output together. This waits for the device that holds them."""
        tokens = self._states.all_token_ids.gpu[place, :length].tolist()
        prompt = int(self._states.prompt_len.np[place])
        return tokens[:prompt], tokens[prompt:]


class RunnerLimits(NamedTuple):
    """What the newer model runner holds of one request. More is an error there that ends the engine.

    stop_token_ids: those that min_tokens holds off, the model's own included. bad_word_tokens: as vLLM spells the
    words, up to two runs of tokens for each.
    """

    allowed_token_ids: int
    logit_bias: int
    stop_token_ids: int
    bad_word_tokens: int


def runner_limits(vllm_config: Any) -> RunnerLimits | None:
    """Return the limits of the model runner; None with the older one, which has none."""
    return newer_runner_limits() if vllm_config.use_v2_model_runner else None


@cache
def newer_runner_limits() -> RunnerLimits:
    """Return the limits of the newer model runner."""
    bias = import_module("vllm.v1.worker.gpu.sample.logit_bias")
    most_ids, most_biases = bias.MAX_NUM_ALLOWED_TOKEN_IDS, bias.MAX_NUM_LOGIT_BIAS_TOKENS
    words = _find("vllm.envs", "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS")
    return RunnerLimits(most_ids, most_biases, bias.MAX_NUM_STOP_TOKEN_IDS, words)


ENGINE_PROCESSES = ("EngineCore", "DP_Coordinator")
"""In the names, as multiprocessing knows them, of what vLLM's front end starts."""


def engine_process_ids(engine: Any) -> list[int]:
    """Return the ids of what vLLM's front end has started for this `AsyncLLM`; none if Ray has started everything."""
    resources = engine.engine_core.resources
    processes = list(getattr(resources.engine_manager, "processes", ()))
    if resources.coordinator is not None:
        processes.append(resources.coordinator.proc)
    return [process.pid for process in processes if process.pid]


def replica_count(engine: Any) -> int:
    """Return how many replicas of the model an `AsyncLLM` holds."""
    return int(engine.vllm_config.parallel_config.data_parallel_size)


def fail_requests(engine: Any) -> None:
    """Report to all requests of an `AsyncLLM` that it is dead. vLLM does so only when it notices its processes' end."""
    engine.output_processor.propagate_error(engine.dead_error)


def expect_the_end(engine: Any) -> None:
    """Keep an `AsyncLLM` from treating, and logging, the end of its processes as a failure."""
    if engine.output_handler is not None:
        engine.output_handler.cancel()
    engine.engine_core.resources.engine_dead = True


def accepts_images(engine: Any) -> bool:
    """Whether the model of an `AsyncLLM` accepts images."""
    multimodal = engine.model_config.is_multimodal_model
    return multimodal and "image" in engine.renderer.get_mm_processor().info.supported_mm_limits


def embedding_fields(engine: Any) -> frozenset[str]:
    """Return the embeddings that its model accepts in place of an image, and what it needs to know beside them."""
    parser = engine.renderer.get_mm_processor().info.data_parser
    return frozenset(parser.embedding_fields.get("image", ()))


def mistral_tokens(engine: Any) -> Callable[[int, tuple[int, int]], list[int]] | None:
    """Return `ImagePlaceholders.written` for a model in Mistral's own format; None for another one.

    vLLM expects every token of such a model's images in the prompt, as mistral_common writes them.
    """
    processor = engine.renderer.get_mm_processor().info.get_hf_processor()
    break_id, end_id = (getattr(processor, f"image_{name}_id", None) for name in ("break", "end"))
    pixels: Any = getattr(processor, "image_processor", None)
    if break_id is None or not hasattr(pixels, "get_number_of_image_patches"):
        return None

    def written(number: int, size: tuple[int, int]) -> list[int]:
        _, rows, columns = pixels.get_number_of_image_patches(size[1], size[0])
        tokens = [*[processor.image_token_id] * columns, break_id] * rows
        tokens[-1] = end_id
        return tokens

    return written


def most_rows(engine: Any) -> int:
    """Return the most encoder rows of one image; 0 if there is no such limit."""
    return int(engine.input_processor.mm_encoder_cache_size)


def image_placeholder(vllm: Vllm, config: Any) -> tuple[Callable[[int], str | None], bool]:
    """(what vLLM writes for image number `i`, whether the model's processor inserts images itself).

    config: vLLM's ModelConfig.
    """
    try:
        cls = vllm.get_model_cls(config)
    except (ValueError, ImportError) as error:
        logger.debug("the model's class cannot be asked for a placeholder: %s", error)
        return (lambda number: None), False

    def placeholder(number: int) -> str | None:
        try:
            text: str | None = cls.get_placeholder_str("image", number)
        except (AttributeError, ValueError, NotImplementedError) as error:
            logger.debug("vLLM names no placeholder: %s", error)
            return None
        return text

    # A processor that inserts is the only kind whose module knows how to.
    inserts = placeholder(1) is None and hasattr(sys.modules.get(cls.__module__), "PromptInsertion")
    return placeholder, inserts


def multiproc_executor() -> Any:
    """Return the class that runs the workers of one machine."""
    return _find("vllm.v1.executor.multiproc_executor", "MultiprocExecutor")


_PARSERS = {
    "tool_call_parser": ("_TOOL_PARSERS_TO_REGISTER", "tool_parsers"),
    "reasoning_parser": ("_REASONING_PARSERS_TO_REGISTER", "reasoning"),
}
"""Our option -> the table of vLLM's parsers and its folder."""

SECRET = frozenset({"hf_token"})
"""Fields of `AsyncEngineArgs` whose value is never shown."""


@cache
def architectures() -> frozenset[str]:
    """Return the architectures with which the installed vLLM generates; empty if it cannot be read."""
    tables = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
    return frozenset().union(*(_keys(table, "model_executor", "models", "registry.py") for table in tables))


@cache
def engine_argument_names() -> frozenset[str]:
    """Return the fields of `AsyncEngineArgs`, which are options here; empty if vLLM is not installed.

    So a misspelt option is reported at once, whichever backend serves.
    """
    return frozenset(
        item.target.id
        for node in _source("engine", "arg_utils.py")
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_")
    )


@cache
def parser_names(option: str) -> frozenset[str]:
    """Return the parsers of the installed vLLM for that option; empty if it is not installed."""
    table, folder = _PARSERS[option]
    return _keys(table, folder, "__init__.py")


def _keys(table: str, *path: str) -> frozenset[str]:
    """Return the keys of a table in a file of the installed vLLM; none if it cannot be read."""
    keys = (key for value in _assigned(table, *path) if isinstance(value, ast.Dict) for key in value.keys)
    return frozenset(str(key.value) for key in keys if isinstance(key, ast.Constant))


def _assigned(name: str, *path: str) -> Iterator[ast.expr]:
    """Yield what a file of the installed vLLM assigns to a name."""
    for node in _source(*path):
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            yield node.value


def _source(*path: str) -> list[ast.stmt]:
    """Return the statements of a file of the installed vLLM; none if it cannot be read."""
    spec = find_spec("vllm")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        try:
            return ast.parse(Path(place, *path).read_bytes()).body
        except (OSError, SyntaxError, ValueError):
            continue
    return []
