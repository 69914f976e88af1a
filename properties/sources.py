"""Reads the places where options are written, AWS's vLLM and SGLang containers' variables included.

Only what cannot be read is a problem here. A container's variable stands for a flag, `SM_VLLM_MAX_MODEL_LEN` for
`--max-model-len`. vLLM's flags are options here as well; SGLang's are translated where an option means the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import javaproperties

from properties.field import TRUE, Level, Variable
from properties.names import KEYS, OPTIONS, by_name, key_from_command_line, key_from_environment, key_of
from properties.problem import Report
from properties.settings import Settings

FILE_NAME = "serving.properties"


@dataclass(frozen=True)
class RawValue:
    """A value as someone wrote it.

    Attributes:
        level: Where it was written.
        key: Key as in serving.properties, such as "option.dtype"; not necessarily a known one.
        raw: The text, never empty.
        location: See `Source.location`.
        rank: Among values of one level, those with the lowest rank count.
        variable: The environment variable, if it has its own name.
        name: The name as written, if `key` is the option for which it stands.
    """

    level: Level
    key: str
    raw: str
    location: str
    rank: int = 0
    variable: Variable | None = None
    name: str | None = None


def read_command_line(options: Sequence[str], report: Report) -> Iterator[RawValue]:
    """Read `--option key=value` arguments, as "key=value", and options written as flags, as "--key=value"."""
    for text in options:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            report.problem(f"--option {text}: allowed: NAME=VALUE")
        elif value.strip():
            name = name.strip()
            flag = name.startswith("--")
            key = key_from_command_line(name.removeprefix("--").replace("-", "_") if flag else name)
            yield RawValue(Level.COMMAND_LINE, key, value, name if flag else f"--option {name}")


def read_environment(environ: Mapping[str, str]) -> Iterator[RawValue]:
    """Read OPTION_*, SERVING_* and the variables with their own names. Empty variables are ignored."""
    for variable, value in environ.items():
        key = key_from_environment(variable)
        if key is not None and key != "option." and value.strip():
            yield RawValue(Level.ENVIRONMENT, key, value, variable)
    for name, option in OPTIONS.items():
        for own in option.variables:
            value = environ.get(own.name, "")
            if value.strip():
                yield RawValue(own.level, key_of(name), value, own.name, own.rank, own)


def read_file(path: Path, report: Report) -> Iterator[RawValue]:
    """Read a file in Java's properties syntax: UTF-8, or Latin-1 if it is not valid UTF-8.

    If a key is written twice the later one counts, as in Java, with a warning.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        report.problem(f"{path.name} cannot be read: {error.strerror}")
        return
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    found: dict[str, RawValue] = {}
    line = 1
    try:
        for element in javaproperties.parse(text):
            if isinstance(element, javaproperties.KeyValue):
                location = f"{path.name} line {line}"
                before = found.pop(element.key, None)
                if before is not None:
                    report.warn(f"{element.key} is written twice; {location} counts, not {before.location}")
                found[element.key] = RawValue(Level.FILE, element.key, element.value, location)
            line += len(re.findall(r"\r\n|\r|\n", element.source))
    except javaproperties.InvalidUEscapeError as error:
        report.problem(f"{path.name} line {line}: {error} (a backslash must be written twice in this file)")
    yield from (written for written in found.values() if written.raw.strip())


VLLM_PREFIX = "SM_VLLM_"
SGLANG_PREFIX = "SM_SGLANG_"

SAME = {"model": "model_id", "api_keys": "api_key", "model_tag": "model_id", "allowed_origins": "cors_allowed_origin"}
"""Flag of vLLM -> name of the option, where it is different."""

WITHOUT_EFFECT = {
    "disable_log_requests": 0, "enable_log_requests": 0, "disable_log_stats": 0, "disable_uvicorn_access_log": 0,
    "disable_frontend_multiprocessing": 0, "enable_request_id_headers": 0, "disable_fastapi_docs": 0,
    "uvicorn_log_level": 1, "max_log_len": 1, "swap_space": 1, "max_logprobs": 1, "image_processor": 1,
    "image_processor_revision": 1, "disable_image_processor": 0, "no_image_processor": 0,
}  # fmt: skip
"""Flags of vLLM and Aphrodite that affect no response -> number of their values.

Images are always prepared by the model's own processor, as vLLM did unless it was told otherwise.
"""

_ADAPTERS = "put adapters into adapters/ beside the model, or send them to POST /adapters"
VLLM_WITHOUT = by_name(
    {
        _ADAPTERS: "lora_modules",
        "pages of cors_allowed_origin may use every method and header that the server has": (
            "allowed_methods allowed_headers allow_credentials"
        ),
        "of vLLM's own HTTP server, which this is not": "middleware root_path uds headless",
        "one process speaks HTTP": "api_server_count",
        "the port speaks plain HTTP: end TLS in front of the server": (
            "ssl_keyfile ssl_certfile ssl_ca_certs ssl_cert_reqs ssl_ciphers enable_ssl_refresh"
        ),
        "the tokenizer is the model's own": "tokenizer",
        "prompts are tokenised here": "skip_tokenizer_init",
        "the role of replies is assistant": "response_role",
        "the parsers are this server's and the installed vLLM's": "tool_parser_plugin",
        "tools are called by the client": "tool_server",
        "a request asks for it": "return_tokens_as_token_ids",
        "replies always tell the cached tokens": "enable_prompt_tokens_details",
        "see log_prompts": "enable_log_outputs",
    }
)
"""Flag of vLLM's server without an equivalent -> what to do instead. On the command line they are refused."""

_SAME_IN_SGLANG = (
    "served_model_name revision trust_remote_code load_format dtype kv_cache_dtype enable_lora max_lora_rank host port "
    "api_key chat_template tool_call_parser reasoning_parser"
)
SGLANG = {name: name for name in _SAME_IN_SGLANG.split()} | by_name(
    {
        "model_id": "model_path model",
        "quantize": "quantization",
        "max_model_len": "context_length",
        "gpu_memory_utilization": "mem_fraction_static",
        "max_rolling_batch_size": "max_running_requests",
        "job_queue_size": "max_queued_requests",
        "max_rolling_batch_prefill_tokens": "chunked_prefill_size",
        "tensor_parallel_degree": "tp tp_size tensor_parallel_size",
        "pipeline_parallel_degree": "pp pp_size pipeline_parallel_size",
        "data_parallel_degree": "dp dp_size data_parallel_size",
        "seed": "random_seed",
        "cpu_offload_gb_per_gpu": "cpu_offload_gb",
        "engine_stuck_timeout": "watchdog_timeout",
        "enforce_eager": "disable_cuda_graph",
        "enable_prefix_caching": "disable_radix_cache",
        "max_loras": "max_loras_per_batch",
        "max_cpu_loras": "max_loaded_loras",
        "limit_mm_per_prompt": "limit_mm_data_per_request",
    }
)
"""Flag of SGLang -> our option."""

SGLANG_WITHOUT = by_name(
    {
        "the tokenizer is the model's own": "tokenizer_path",
        "see option.tokenizer_mode": "tokenizer_mode",
        "prompts are tokenised here": "skip_tokenizer_init",
        "see option.kv_cache_memory_mb": "max_total_tokens",
        "see option.max_rolling_batch_prefill_tokens": "max_prefill_tokens",
        "see option.block_size": "page_size",
        "kernels are chosen for the device": "attention_backend",
        _ADAPTERS: "lora_paths",
        "write option.speculative_config, as vLLM's": (
            "speculative_algorithm speculative_draft_model_path speculative_num_steps speculative_eagle_topk "
            "speculative_num_draft_tokens"
        ),
        "see option.request_priorities, with which lower numbers come first": "enable_priority_scheduling",
        "a model that takes images is served with them": "enable_multimodal",
        "/metrics is always served": "enable_metrics",
        "embeddings are not served": "is_embedding",
    }
)
"""Common flag of SGLang without an equivalent -> what to do instead."""

_SWITCHED_OFF = frozenset({"disable_radix_cache"})
_PARSERS = {
    "llama3": "llama3_json",
    "qwen": "hermes",
    "qwen25": "hermes",
    "deepseekv3": "deepseek_v3",
    "deepseekv31": "deepseek_v31",
    "gpt_oss": "openai",
    "qwen3_thinking": "qwen3",
}
"""SGLang's name of a parser -> ours or vLLM's."""


def read_containers(
    environ: Mapping[str, str], report: Report, backend_options: Collection[str] = ()
) -> Iterator[RawValue]:
    """Read the variables as the containers do: "true" sets a switch, and "false" omits a flag that is not a switch.

    backend_options: see `Configuration`. A flag without effect is passed on if the backend knows it.
    """
    for variable, text in environ.items():
        if text.strip() and variable.startswith(SGLANG_PREFIX):
            yield from _sglang(variable, text, report)
        elif text.strip() and variable.startswith(VLLM_PREFIX):
            yield from _vllm(variable, text, report, backend_options)


def _vllm(variable: str, text: str, report: Report, backend_options: Collection[str]) -> Iterator[RawValue]:
    flag = variable.removeprefix(VLLM_PREFIX).lower()
    unread = flag in WITHOUT_EFFECT and flag not in backend_options
    if (reason := "no answer depends on it" if unread else VLLM_WITHOUT.get(flag)) is not None:
        report.warn(f"{variable} has no effect here: {reason}")
        return
    positive = flag.removeprefix("no_")
    if positive != flag and key_from_command_line(flag) not in KEYS:
        flag, text = positive, "false" if text.strip().lower() in TRUE else ""
    yield from _written(variable, key_from_command_line(SAME.get(flag, flag)), text)


def _sglang(variable: str, text: str, report: Report) -> Iterator[RawValue]:
    flag = variable.removeprefix(SGLANG_PREFIX).lower()
    name = SGLANG.get(flag)
    if name is None:
        reason = SGLANG_WITHOUT.get(flag, "SGLang's flag has no equivalent")
        report.warn(f"{variable} has no effect here: {reason}")
        return
    if flag in _SWITCHED_OFF:
        text = "false" if text.strip().lower() in TRUE else ""
    elif flag == "chunked_prefill_size" and text.strip() == "-1":
        name, text = "enable_chunked_prefill", "false"
    elif name in ("tool_call_parser", "reasoning_parser"):
        parser = text.strip().lower().replace("-", "_")
        text = _PARSERS.get(parser, parser)
        if name == "tool_call_parser":  # SGLang needs no switch beside it
            yield from _written(variable, key_of("enable_auto_tool_choice"), "true")
    yield from _written(variable, key_of(name), text)


def _written(variable: str, key: str, text: str) -> Iterator[RawValue]:
    name = KEYS.get(key)
    switch = name is None or Settings.model_fields[name].annotation is bool
    if text.strip() and (switch or text.strip().lower() != "false"):
        yield RawValue(Level.CONTAINER, key, text if name and OPTIONS[name].verbatim else text.strip(), variable)
