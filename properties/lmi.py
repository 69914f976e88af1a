"""Settings of LMI that mean something else here: names without effect, older names, and what LMI combines.

In LMI, `rolling_batch=disable` has two meanings. Alone, requests run one after the other. Together with LMI's
asynchronous mode or an asynchronous handler, the engine batches by itself, so that LMI's own queue must not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from properties.field import TRUE
from properties.names import PREFIX, by_name, key_of
from properties.problem import Report, assigned
from properties.sources import RawValue

_IGNORED_OPTIONS = {
    "there is one mode": "mpi_mode use_passive_workers",
    "replicas always load side by side": "parallel_loading",
    "the server's own Python runs the model": "pythonExecutable python_executable enable_venv",
    "set environment variables on the container": "env",
    "write option.model_id": "model_dir",
    'deprecated; a request asks for a stream with "stream": true': "enable_streaming",
    "deprecated; option.reasoning_parser alone switches it on": "enable_reasoning",
    "the Bedrock dialect is not supported": "bedrock_compat",
    "sessions are kept in memory": "sessions_path sessions_s3url",
    "write option.kv_transfer_config and LMCache's own variables": "lmcache_config_file lmcache_auto_config",
    "write option.speculative_config": (
        "speculative_draft_model draft_model_id spec_length speculative_model num_speculative_tokens "
        "speculative_draft_tensor_parallel_size speculative_max_model_len speculative_disable_by_batch_size "
        "speculative_model_quantization speculative_disable_mqa_scorer spec_decoding_acceptance_method "
        "ngram_prompt_lookup_max ngram_prompt_lookup_min num_lookahead_slots max_draft_len speculative_length "
        "draft_model_tp_size record_acceptance_rate speculative_telemetry"
    ),
    "removed from vLLM": (
        "lora_extra_vocab_size long_lora_scaling_factors qlora_adapter_name_or_path calculate_kv_scales "
        "quantization_param_path override_neuron_config"
    ),
    "a request that loses its cache is computed again, so nothing is swapped to the host": "swap_space",
    "a request that loses its cache is always computed again": "preemption_mode",
    "vLLM takes the devices of the platform that it was installed for; see load_on_devices": "device",
    "removed from vLLM, whose engine does this by itself now": (
        "num_scheduler_steps multi_step_stream_outputs scheduler_delay_factor use_v2_block_manager "
        "disable_async_output_proc max_num_partial_prefills max_long_partial_prefills"
    ),
    "see option.max_cudagraph_capture_size": "max_context_len_to_capture max_seq_len_to_capture",
    "write option.cudagraph_capture_sizes": "cuda_graph_sizes",
    "the engine always has a process of its own": "disable_frontend_multiprocessing engine_use_ray",
    "requests are logged without their prompts; see log_prompts": "disable_log_requests",
    "write option.distributed_executor_backend=ray": "worker_use_ray",
    "prompts are tokenised in threads of the server": (
        "tokenizer_pool_size tokenizer_pool_type tokenizer_pool_extra_config"
    ),
    "prompt adapters were removed from vLLM; see option.enable_lora": (
        "enable_prompt_adapter max_prompt_adapters max_prompt_adapter_token"
    ),
    "the server chooses what compiles grammars; vLLM's own settings are option.structured_outputs_config": (
        "guided_decoding_backend guided_decoding_disable_fallback guided_decoding_disable_any_whitespace "
        "guided_decoding_disable_additional_properties"
    ),
    "requests cannot name logits processors": "logits_processor_pattern",
    "write option.mm_processor_cache_gb=0": "disable_mm_preprocessor_cache",
    "write option.mm_encoder_tp_mode=data": "enable_multimodal_encoder_data_parallel",
    "images are never read from files: send them as data: URLs": "allowed_local_media_path",
    "embeddings are not served": "override_pooler_config normalize",
    "write option.hf_overrides: without it the model runs as its config.json says": (
        "rope_scaling rope_theta rotary_base rotary_dim rotary_scaling_type rotary_scaling_factor"
    ),
    "there is no Hugging Face Accelerate backend": ("device_map low_cpu_mem_usage disable_flash_attn is_peft_model"),
    "prompts join the batch at the next step": "waiting_steps",
    "adapters are looked for in adapters/ beside the model": "adapters",
    "replies have no limit of bytes; a request limits its answer with max_tokens": "max_output_size",
    "a request limits its answer with max_tokens": "max_new_tokens",
    "write option.max_model_len; a request limits its answer with max_tokens": (
        "max_input_len max_output_len max_tokens max_seq_len n_positions"
    ),
    'a request says what it accepts in its "Accept" header': "default_accept",
    "write load_on_devices": "device_id",
    "write option.tensor_parallel_degree": "multi_gpu",
    "see option.nnodes and option.node_rank": "cluster_size",
    "each option has a name of its own here": "kwargs",
    "DeepSpeed's, which LMI has removed": (
        "deepspeed_config_path ds_config checkpoint return_tuple training_mp_size triangular_masking"
    ),
    "write option.enforce_eager": "enable_cuda_graph",
    "the key/value cache is always paged": "paged_attention",
    "models are not partitioned ahead of serving": "save_mp_checkpoint_path",
    "of LMI's sequence scheduler, which LMI has removed": "decoding_strategy max_sparsity max_splits",
    "write option.max_rolling_batch_prefill_tokens": "max_num_tokens",
    "write option.max_rolling_batch_size": "max_num_sequences max_batch_size",
    "beam search is not served": "max_beam_width",
    "write option.block_size": "tokens_per_block",
    "see option.gpu_memory_utilization and option.kv_cache_memory_mb": "kv_cache_free_gpu_mem_fraction",
    "write option.enable_prefix_caching": "enable_kv_cache_reuse",
    "TensorRT-LLM's, which is not served here": (
        "enable_trt_overlap batch_scheduler_policy batching_type backend baichuan_model_version "
        "chatglm_model_version gpt_model_version multi_block_mode use_fused_mlp use_fp8_context_fmha "
        "logits_dtype trtllm_checkpoint_path num_checkpoint_workers num_engine_workers load_by_shard fast_build "
        "enable_build_cache auto_parallel embedding_parallel_mode gather_generation_logits normalize_log_probs"
    ),
    "see option.disable_custom_all_reduce": "use_custom_all_reduce",
    "models are not calibrated here: serve one that is quantised already, or see option.quantize": (
        "smoothquant_alpha smoothquant_per_token smoothquant_per_channel multi_query_mode awq_format "
        "awq_calib_size awq_block_size awq_ignore_layers awq_mm_version awq_weight_bit_width awq_zero_point "
        "fp8_ignore fp8_scheme q_format calib_size calib_batch_size"
    ),
    "write option.dtype": "amp",
    "for Neuron devices, which are not served here": (
        "neuron_optimize_level enable_mixed_precision_accumulation enable_saturate_infinity unroll "
        "load_split_model compiled_graph_path save_compiled_model draft_model_compiled_path "
        "context_length_estimate group_query_attention model_loader rolling_batch_strategy fuse_qkv "
        "attention_layout collectives_layout cache_layout partition_schema all_reduce_dtype cast_logits_dtype "
        "on_device_embedding on_device_embedding_config"
    ),
    "write served_model_name; the model's files have the names of the hub's format": "modelName modeName",
    "of DJL's engines for other kinds of models; this server generates text": (
        "mapLocation extraFiles hasParameter interOpNumThreads intraOpNumThreads executionMode optLevel "
        "memoryPatternOptimization cpuArenaAllocator disablePerSessionThreads customOpLibrary ortDevice "
        "optimization use_stable_diffusion num_images_per_prompt height width model_format skops_trusted_types "
        "trust_insecure_model_files"
    ),
    'a request names its stop strings in "stop"': "stop_sequence",
}
"""Why options have no effect -> their names, without `option.`."""

_IGNORED_KEYS = {
    "write load_on_devices": "load_on_device",
    "see option.gpu_memory_utilization and option.kv_cache_memory_mb": (
        "required_memory_mb reserved_memory_mb gpu.required_memory_mb gpu.reserved_memory_mb"
    ),
    "of DJL's engines for other kinds of models; this server generates text": (
        "translator translatorFactory application batchifier"
    ),
    "requests always share a rolling batch; see option.max_rolling_batch_size": (
        "batch_size max_dynamic_batch_size max_batch_delay"
    ),
    "replicas are never stopped for idleness": "max_idle_time",
    "write minWorkers and maxWorkers": "gpu.minWorkers gpu.maxWorkers cpu.minWorkers cpu.maxWorkers",
    "request metrics are always kept; see /metrics": "log_request_metric metrics_aggregation",
    "/metrics is always served": "prometheus",
    "the port is open at once and /ping answers 503 until the model can generate": "wait_model_loading",
    "/ping follows the engine's own state": (
        "allow_multi_status health_check_override fail_fast error_rate_wlm error_rate_server error_rate_model "
        "error_rate_any"
    ),
    "each error has a fixed status code": (
        "bad_request_http_code wlm_error_http_code throttle_error_http_code server_error_http_code timeout_http_code"
    ),
    "there is one port for everything": "management_address cluster_address",
    "pages of cors_allowed_origin may use every method and header that the server has": (
        "cors_allowed_methods cors_allowed_headers"
    ),
    "this server serves one model; see multi_model": "model_url_pattern load_models model_store",
    "of DJL's Java server, which this is not": (
        "number_of_netty_threads netty_client_threads use_native_io io_ratio plugin_folder"
    ),
    "the port speaks plain HTTP: end TLS in front of the server": (
        "keystore keystore_pass keystore_type private_key_file certificate_file"
    ),
}
"""The same for keys that are written without `option.`."""

IGNORED = by_name(_IGNORED_OPTIONS, PREFIX) | by_name(_IGNORED_KEYS)
"""Key that is understood but has no effect -> the reason, which the warning gives."""

SILENT = frozenset({"opts", "features"})
"""SERVING_* names that LMI's images and SageMaker's SDK set for the Java server; they cause no warning."""

RENAMED: dict[str, str] = {
    "option.s3url": "option.model_id",
    "option.s3Url": "option.model_id",
    "option.model_id_or_path": "option.model_id",
    "option.data_type": "option.dtype",
    "option.huggingface_token": "option.hf_token",
}
"""Older names of DJL and LMI -> the current name; they have the same effect, with a warning."""

TRUE_MEANS: dict[str, tuple[str, str, str]] = {
    "option.load_in_8bit": ("quantize", "bitsandbytes", "option.quantize=int8_per_channel_weight_only"),
    "option.load_in_4bit": (
        "quantize",
        "bitsandbytes",
        "option.quantize=fp8, or serve a model that is quantised to 4 bits already (AWQ, GPTQ)",
    ),
}
"""Deprecated switches: the option and value that `true` stands for, and what to write instead.

vLLM no longer supports bitsandbytes, and refuses it.
"""


def ignored_because(key: str) -> str | None:
    """Return the reason why a key has no effect, with or without `option.`; None for any other key."""
    bare = key.removeprefix(PREFIX).lower()
    return _BY_NAME.get(key.lower()) or _BY_NAME.get(bare) or _BY_NAME.get(PREFIX + bare)


_BY_NAME = {name.lower(): reason for name, reason in IGNORED.items()}
"""Environment variables have no lower-case letters."""


PACKAGE = "djl_python"

_TENSORRT = "TensorRT-LLM is not served here; vLLM or the embedded engine takes its place"
_DEEPSPEED = "LMI removed DeepSpeed; vLLM or the embedded engine takes its place"
_FASTER = "LMI removed FasterTransformer; vLLM or the embedded engine takes its place"
_NEURON = "Neuron devices are not served here; vLLM or the embedded engine takes its place"
_NO_LANGUAGE = "this server generates text, and runs no models of other kinds"


@dataclass(frozen=True)
class LmiHandler:
    """A module of LMI that `option.entryPoint` may name.

    Attributes:
        vllm: It runs vLLM.
        asynchronous: It batches by itself, even with rolling_batch=disable.
        note: Why something else serves instead.
        refused: Nothing here can replace it.
    """

    vllm: bool = False
    asynchronous: bool = False
    note: str | None = None
    refused: bool = False


HANDLERS = {
    "lmi_vllm": LmiHandler(vllm=True, asynchronous=True),
    "huggingface": LmiHandler(note="the server's own backends answer"),
    "rolling_batch": LmiHandler(note="the server's own backends answer"),
    "lmi_trtllm": LmiHandler(asynchronous=True, note=_TENSORRT),
    "tensorrt_llm": LmiHandler(note=_TENSORRT),
    "tensorrt_llm_python": LmiHandler(note=_TENSORRT),
    "deepspeed": LmiHandler(note=_DEEPSPEED),
    "fastertransformer": LmiHandler(note=_FASTER),
    "transformers_neuronx": LmiHandler(note=_NEURON),
    "transformersneuronx": LmiHandler(note=_NEURON),
    "stable_diffusion_inf2": LmiHandler(note=_NO_LANGUAGE, refused=True),
    "sklearn_handler": LmiHandler(note=_NO_LANGUAGE, refused=True),
    "xgboost_handler": LmiHandler(note=_NO_LANGUAGE, refused=True),
}
"""The part after `djl_python.` -> its handler."""

_ALIASES = {
    "transformers-neuronx": "transformers_neuronx",
    "stable-diffusion": "stable_diffusion_inf2",
    "async_service": "lmi_vllm",
}

REPLACED_BECAUSE = {
    "trtllm": _TENSORRT,
    "tensorrtllm": _TENSORRT,
    "deepspeed": _DEEPSPEED,
    "fastertransformer": _FASTER,
    "tnx": _NEURON,
}
"""Old value of rolling_batch or engine -> why another one is used."""


@dataclass
class Meaning:
    """The combined meaning of LMI's settings.

    Attributes:
        values: Option -> the value that counts.
        handler: LMI's own handler, if one was named.
        asked_by: Description of the setting that requests vLLM.
        used: Settings that have an effect here, although they have none alone.
    """

    values: dict[str, RawValue]
    handler: str | None = None
    asked_by: str | None = None
    used: tuple[RawValue, ...] = ()


def taken_together(values: Mapping[str, RawValue], ignored: Collection[RawValue], report: Report) -> Meaning:
    """Combine the settings that LMI combines. values: of each option. ignored: what has no effect alone."""
    meaning = Meaning(dict(values))
    module = _built_in(meaning, report)
    switch = values.get("async_mode")
    cause = switch if switch is not None and switch.raw.lower() in TRUE else None
    if module is not None and module.asynchronous:
        cause = values["entry_point"]
    if cause is not None and (module is None or module.vllm):
        meaning.asked_by = _described(cause)
    batching = values.get("rolling_batch")
    if batching is None or batching.raw != "disable":
        return meaning
    beside = cause or _dynamic_batch(ignored)
    if beside is None:
        return meaning
    raw, location = "auto" if cause else "rolling", f"{batching.location}, beside {_described(beside)}"
    meaning.values["rolling_batch"] = replace(batching, raw=raw, location=location)
    if cause is None:
        meaning.used = (beside,)
        most = replace(beside, key=key_of("max_rolling_batch_size"), raw=beside.raw.strip(), name=beside.key)
        meaning.values.setdefault("max_rolling_batch_size", most)
    return meaning


def handler_named(entry_point: str) -> LmiHandler | None:
    """Return LMI's own handler of that name; None if there is none."""
    package, _, rest = entry_point.partition(".")
    name = rest.partition(".")[0].lower()
    return HANDLERS.get(_ALIASES.get(name, name)) if package == PACKAGE else None


def _built_in(meaning: Meaning, report: Report) -> LmiHandler | None:
    """Remove one of LMI's own handlers from the values: it is not a file of the model."""
    written = meaning.values.get("entry_point")
    if written is None or written.raw.partition(".")[0] != PACKAGE:
        return None
    del meaning.values["entry_point"]
    described = assigned(key_of("entry_point"), repr(written.raw), written.location)
    module = handler_named(written.raw)
    if module is None:
        known = ", ".join(f"{PACKAGE}.{name}" for name, one in HANDLERS.items() if not one.refused)
        report.problem(f"{described}: not a handler of LMI's; allowed: a Python file, or {known}", "entry_point")
    elif module.refused:
        report.problem(f"{described}: {module.note}", "entry_point")
    else:
        meaning.handler = written.raw
        if module.note is not None:
            report.warn(f"{described} is deprecated: {module.note}", "entry_point")
    return module


def _dynamic_batch(ignored: Collection[RawValue]) -> RawValue | None:
    """Return LMI's batch_size, if several requests may share a batch."""
    sizes = [
        item
        for item in ignored
        if item.key.removeprefix("option.") in ("batch_size", "max_dynamic_batch_size")
        and item.raw.strip() not in ("0", "1")
    ]
    return min(sizes, key=lambda item: (item.level, item.key), default=None)


def _described(item: RawValue) -> str:
    return assigned(item.key, item.raw.strip(), item.location)
