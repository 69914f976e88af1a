"""Names of LMI that are understood but have no effect here, with the reason that the warning gives."""

from __future__ import annotations

_SESSIONS = "sessions are kept in memory"
_HEALTH = "/ping follows the engine's own state"
_STATUS = "each error has a fixed status code"
_CORS = "pages of cors_allowed_origin may use every method and header that the server has"
_ONE_MODEL = "this server serves one model"
_DYNAMIC = "requests always share a rolling batch; see option.max_rolling_batch_size"
_WORKERS = "write minWorkers and maxWorkers"
_PYTHON = "the server's own Python runs the model"
_ACCELERATE = "there is no Hugging Face Accelerate backend"
_SPECULATIVE = "write option.speculative_config"
_LMCACHE = "write option.kv_transfer_config and LMCache's own variables"
_MEMORY = "see option.gpu_memory_utilization and option.kv_cache_memory_mb"
_REMOVED = "removed from vLLM"

IGNORED: dict[str, str] = {
    "option.async_mode": "there is one mode",
    "option.mpi_mode": "there is one mode",
    "option.use_passive_workers": "there is one mode",
    "option.parallel_loading": "copies of the model always load side by side",
    "option.pythonExecutable": _PYTHON,
    "option.python_executable": _PYTHON,
    "option.enable_venv": _PYTHON,
    "option.env": "set environment variables on the container",
    "option.model_dir": "write option.model_id",
    "option.enable_streaming": 'deprecated; a request asks for a stream with "stream": true',
    "option.enable_reasoning": "deprecated; option.reasoning_parser alone switches it on",
    "option.bedrock_compat": "the Bedrock dialect is not supported",
    "option.sessions_path": _SESSIONS,
    "option.sessions_s3url": _SESSIONS,
    "option.lmcache_config_file": _LMCACHE,
    "option.lmcache_auto_config": _LMCACHE,
    "option.speculative_draft_model": _SPECULATIVE,
    "option.draft_model_id": _SPECULATIVE,
    "option.spec_length": _SPECULATIVE,
    "option.lora_extra_vocab_size": _REMOVED,
    "option.long_lora_scaling_factors": _REMOVED,
    "option.normalize": "embeddings are not served",
    "option.device_map": _ACCELERATE,
    "option.low_cpu_mem_usage": _ACCELERATE,
    "option.disable_flash_attn": _ACCELERATE,
    "option.is_peft_model": _ACCELERATE,
    "option.waiting_steps": "prompts join the batch at the next step",
    "option.stop_sequence": 'a request names its stop strings in "stop"',
    "batch_size": _DYNAMIC,
    "max_dynamic_batch_size": _DYNAMIC,
    "max_batch_delay": _DYNAMIC,
    "max_idle_time": "copies of the model are never stopped for idleness",
    "gpu.minWorkers": _WORKERS,
    "gpu.maxWorkers": _WORKERS,
    "cpu.minWorkers": _WORKERS,
    "cpu.maxWorkers": _WORKERS,
    "required_memory_mb": _MEMORY,
    "reserved_memory_mb": _MEMORY,
    "gpu.required_memory_mb": _MEMORY,
    "gpu.reserved_memory_mb": _MEMORY,
    "log_request_metric": "request metrics are always kept; see /metrics",
    "metrics_aggregation": "request metrics are always kept; see /metrics",
    "prometheus": "/metrics is always served",
    "wait_model_loading": "the port is open at once and /ping answers 503 until the model can generate",
    "allow_multi_status": _HEALTH,
    "health_check_override": _HEALTH,
    "fail_fast": _HEALTH,
    "error_rate_wlm": _HEALTH,
    "error_rate_server": _HEALTH,
    "error_rate_model": _HEALTH,
    "error_rate_any": _HEALTH,
    "bad_request_http_code": _STATUS,
    "wlm_error_http_code": _STATUS,
    "throttle_error_http_code": _STATUS,
    "server_error_http_code": _STATUS,
    "timeout_http_code": _STATUS,
    "management_address": "there is one port for everything",
    "cors_allowed_methods": _CORS,
    "cors_allowed_headers": _CORS,
    "model_url_pattern": _ONE_MODEL,
    "load_models": _ONE_MODEL,
    "model_store": _ONE_MODEL,
}

SILENT = frozenset({"opts", "features"})
"""SERVING_* names that LMI's images and SageMaker's SDK set for the Java server: not worth a warning."""

TRUE_MEANS: dict[str, tuple[str, str]] = {
    "option.load_in_8bit": ("quantize", "bitsandbytes"),
    "option.load_in_4bit": ("quantize", "bitsandbytes"),
}
"""Deprecated switches: the option and the value that `true` stands for."""


def ignored_because(key: str) -> str | None:
    """The reason why a key has no effect, with or without `option.`; None for any other key."""
    bare = key.removeprefix("option.")
    return IGNORED.get(key) or IGNORED.get(bare) or IGNORED.get(f"option.{bare}")
