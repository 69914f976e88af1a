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
_V1 = "removed from vLLM, whose engine does this by itself now"
_GUIDED = (
    "the server chooses what compiles grammars; vLLM's own settings are option.structured_outputs_config"
)
_OVERRIDES = "write option.hf_overrides: without it the model runs as its config.json says"
_PROMPT_ADAPTERS = "prompt adapters were removed from vLLM; see option.enable_lora"

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
    "option.speculative_model": _SPECULATIVE,
    "option.num_speculative_tokens": _SPECULATIVE,
    "option.speculative_draft_tensor_parallel_size": _SPECULATIVE,
    "option.speculative_max_model_len": _SPECULATIVE,
    "option.speculative_disable_by_batch_size": _SPECULATIVE,
    "option.speculative_model_quantization": _SPECULATIVE,
    "option.speculative_disable_mqa_scorer": _SPECULATIVE,
    "option.spec_decoding_acceptance_method": _SPECULATIVE,
    "option.ngram_prompt_lookup_max": _SPECULATIVE,
    "option.ngram_prompt_lookup_min": _SPECULATIVE,
    "option.num_lookahead_slots": _SPECULATIVE,
    "option.swap_space": "a request that loses its cache is computed again, so nothing is swapped to the host",
    "option.preemption_mode": "a request that loses its cache is always computed again",
    "option.device": "vLLM takes the devices of the platform that it was installed for; see load_on_devices",
    "option.num_scheduler_steps": _V1,
    "option.multi_step_stream_outputs": _V1,
    "option.scheduler_delay_factor": _V1,
    "option.use_v2_block_manager": _V1,
    "option.disable_async_output_proc": _V1,
    "option.max_num_partial_prefills": _V1,
    "option.max_long_partial_prefills": _V1,
    "option.max_context_len_to_capture": "see option.max_cudagraph_capture_size",
    "option.max_seq_len_to_capture": "see option.max_cudagraph_capture_size",
    "option.cuda_graph_sizes": "write option.cudagraph_capture_sizes",
    "option.disable_frontend_multiprocessing": "the engine always has a process of its own",
    "option.disable_log_requests": "requests are logged without their prompts; see log_prompts",
    "option.worker_use_ray": "write option.distributed_executor_backend=ray",
    "option.engine_use_ray": "the engine always has a process of its own",
    "option.tokenizer_pool_size": "prompts are tokenised in threads of the server",
    "option.tokenizer_pool_type": "prompts are tokenised in threads of the server",
    "option.tokenizer_pool_extra_config": "prompts are tokenised in threads of the server",
    "option.enable_prompt_adapter": _PROMPT_ADAPTERS,
    "option.max_prompt_adapters": _PROMPT_ADAPTERS,
    "option.max_prompt_adapter_token": _PROMPT_ADAPTERS,
    "option.qlora_adapter_name_or_path": _REMOVED,
    "option.guided_decoding_backend": _GUIDED,
    "option.guided_decoding_disable_fallback": _GUIDED,
    "option.guided_decoding_disable_any_whitespace": _GUIDED,
    "option.guided_decoding_disable_additional_properties": _GUIDED,
    "option.logits_processor_pattern": "requests cannot name logits processors",
    "option.disable_mm_preprocessor_cache": "write option.mm_processor_cache_gb=0",
    "option.enable_multimodal_encoder_data_parallel": "write option.mm_encoder_tp_mode=data",
    "option.calculate_kv_scales": _REMOVED,
    "option.quantization_param_path": _REMOVED,
    "option.override_neuron_config": _REMOVED,
    "option.override_pooler_config": "embeddings are not served",
    "option.rope_scaling": _OVERRIDES,
    "option.rope_theta": _OVERRIDES,
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

TRUE_MEANS: dict[str, tuple[str, str, str]] = {
    "option.load_in_8bit": ("quantize", "bitsandbytes", "option.quantize=int8_per_channel_weight_only"),
    "option.load_in_4bit": (
        "quantize",
        "bitsandbytes",
        "option.quantize=fp8, or serve a model that is quantised to 4 bits already (AWQ, GPTQ)",
    ),
}
"""Deprecated switches: the option and the value that `true` stands for, and what to write instead: vLLM has no
bitsandbytes any more, and refuses it."""


def ignored_because(key: str) -> str | None:
    """The reason why a key has no effect, with or without `option.`; None for any other key."""
    bare = key.removeprefix("option.")
    return IGNORED.get(key) or IGNORED.get(bare) or IGNORED.get(f"option.{bare}")
