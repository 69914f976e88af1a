"""A script: whether one vLLM has every name, signature and attribute that is used of it. `test_compat.py` runs it.

What is only reached through an object (an engine's renderer, say) is looked for in the source of its class.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from vllm.config import CacheConfig, LoRAConfig, ModelConfig, ParallelConfig, VllmConfig
from vllm.logprobs import Logprob
from vllm.multimodal.inputs import PlaceholderRange
from vllm.multimodal.processing import BaseProcessingInfo
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.reasoning import ReasoningParserManager
from vllm.renderers.base import BaseRenderer
from vllm.tool_parsers import ToolParserManager
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, PrefixCacheStats, SchedulerStats

from handlers.backends.vllm.compat import (
    cpu_takes_block_size,
    find,
    load,
    load_parsing,
    logits_processor,
    newer_logits_processor,
    process_dict_updates,
    registered_names,
)
from handlers.backends.vllm.options.arguments import ALWAYS, WHERE_GIVEN
from handlers.backends.vllm.options.checks import GONE
from handlers.backends.vllm.options.fields import (
    architectures,
    engine_argument_names,
    reasoning_parser_names,
    tool_parser_names,
)
from handlers.backends.vllm.prompts.sampling import SAME, TRANSLATED
from properties.legacy import IGNORED

vllm = load()


def members(cls: Any) -> set[str]:
    """What a class, its bases and their methods define and set."""
    found = set(dir(cls)) | set(getattr(cls, "__struct_fields__", ()))
    for base in cls.__mro__:
        if not base.__module__.startswith("vllm"):
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(base)))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return found


def has(cls: Any, names: str) -> None:
    missing = set(names.split()) - members(cls)
    assert not missing, f"{cls} lacks {missing}"


def parameters(call: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(call).parameters)


# Options.
names = {field.name for field in fields(vllm.AsyncEngineArgs) if not field.name.startswith("_")}
assert names == engine_argument_names(), names ^ engine_argument_names()
ours = {
    *ALWAYS.values(),
    *WHERE_GIVEN.values(),
    "limit_mm_per_prompt",
    "served_model_name",
    "scheduling_policy",
}
ours |= {
    "nnodes",
    "node_rank",
    "master_addr",
    "master_port",
    "distributed_executor_backend",
    "data_parallel_backend",
}
assert ours <= names, ours - names
parser = vllm.AsyncEngineArgs.add_cli_args(vllm.ArgumentParser())
assert {"max_logprobs", "compilation_config"} <= {action.dest for action in parser._actions}
assert {"config_format", "hf_overrides", "mm_encoder_tp_mode", "mm_processor_cache_gb"} <= names
assert {
    "device_ids",
    "cudagraph_capture_sizes",
    "max_cudagraph_capture_size",
    "structured_outputs_config",
} <= names
assert not {name.removeprefix("option.") for name in IGNORED} & names
registered = registered_names()
assert {"fp8", "int8_per_channel_weight_only"} <= set(registered["quantization"])
assert not set(GONE) & set(registered["quantization"])
assert {"auto", "hf", "mistral"} <= set(registered["load_format"]) & set(registered["tokenizer_mode"])
assert cpu_takes_block_size(64)
assert not cpu_takes_block_size(17)
known = architectures()
assert {"LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "LlamaForCausalLM"} <= known
assert not {"MllamaForConditionalGeneration", "BertModel"} & known
has(ModelConfig, "max_model_len dtype hf_config hf_text_config is_multimodal_model get_vocab_size")
has(CacheConfig, "num_gpu_blocks block_size")
has(ParallelConfig, "tensor_parallel_size pipeline_parallel_size data_parallel_size")
has(VllmConfig, "model_config cache_config parallel_config lora_config")

# The engine.
generate = parameters(vllm.AsyncLLM.generate)
assert generate[1:4] == ["prompt", "sampling_params", "request_id"]
assert {"priority", "lora_request", "data_parallel_rank"} <= set(generate)
assert "stat_loggers" in parameters(vllm.AsyncLLM.from_engine_args)
assert "timeout" in parameters(vllm.AsyncLLM.shutdown)
assert len(parameters(vllm.AsyncLLM.add_lora)) == len(parameters(vllm.AsyncLLM.remove_lora)) == 2
assert parameters(vllm.AsyncLLM.pin_lora) == ["self", "lora_id"]
has(LoRAConfig, "max_loras")
assert isinstance(inspect.getattr_static(vllm.AsyncLLM, "errored"), property)
has(vllm.AsyncLLM, "reset_mm_cache renderer model_config vllm_config engine_core output_processor dead_error")
assert parameters(find("vllm.v1.engine.output_processor", "OutputProcessor").propagate_error) == ["self", "e"]
core = "vllm.v1.engine.core_client"
has(find(core, "MPClient"), "resources")
has(find(core, "BackgroundResources"), "engine_manager coordinator")
has(find("vllm.v1.engine.utils", "CoreEngineProcManager"), "processes")
coordinator = find("vllm.v1.engine.coordinator", "DPCoordinator")
has(coordinator, "proc")
# How `processes` knows what a start that failed has left, and which processes an engine cannot do without.
assert 'name="VLLM_DP_Coordinator"' in inspect.getsource(coordinator)
assert "EngineCore" in inspect.getsource(find("vllm.v1.engine.utils", "CoreEngineProcManager").__init__)
assert 'process_name = "Worker"' in inspect.getsource(
    find("vllm.v1.executor.multiproc_executor", "WorkerProc").setup_proc_title_and_log_prefix
)
lora = vllm.LoRARequest("name", 7, "/path")
assert (lora.lora_name, lora.lora_int_id, lora.lora_path) == ("name", 7, "/path")
assert not issubclass(vllm.EngineDeadError, vllm.refusals), "an engine that died is no bad request"
assert not any(issubclass(busy, vllm.refusals) for busy in vllm.busy_errors)

# Requests.
sampling = set(vllm.SamplingParams.__struct_fields__)
assert {*SAME, *TRANSLATED, "n", "output_kind", "structured_outputs", "detokenize"} <= sampling
assert {"json", "regex", "choice", "grammar", "json_object"} <= set(parameters(vllm.StructuredOutputsParams))
assert {"max_total_tokens", "add_special_tokens"} <= set(parameters(vllm.TokenizeParams))
assert parameters(vllm.parse_model_prompt)[:2] == ["model_config", "prompt"]
assert parameters(vllm.model_class)[:1] == ["model_config"]
has(BaseRenderer, "get_mm_processor mm_processor_cache")
assert parameters(BaseRenderer.render_cmpl_async)[1:3] == ["prompts", "tok_params"]
cache = find("vllm.multimodal.cache vllm.multimodal.cache.base", "BaseMultiModalProcessorCache")
assert parameters(cache.invalidate)[1:] == ["mm_hash"]
has(BaseProcessingInfo, "supported_mm_limits data_parser")
has(PlaceholderRange, "offset length get_num_embeds")
has(ModelConfig, "get_inputs_embeds_size")
has(vllm.AsyncLLM, "input_processor")
items = find("vllm.multimodal.inputs vllm.multimodal", "MultiModalKwargsItem")
has(items, "get_data")

# What its newer model runner has room for.
has(find("vllm.config", "VllmConfig"), "use_v2_model_runner")
for limit in ("ALLOWED_TOKEN_IDS", "LOGIT_BIAS_TOKENS", "STOP_TOKEN_IDS"):
    find("vllm.v1.worker.gpu.sample.logit_bias", f"MAX_NUM_{limit}")
for limit in ("NUM_BAD_WORDS", "BAD_WORDS_TOTAL_TOKENS"):
    find("vllm.envs", f"VLLM_MAX_{limit}")
has(vllm.SamplingParams, "clone update_from_tokenizer bad_words_token_ids")
has(vllm.AsyncLLM, "get_tokenizer")

# Samplers of ours in its process.
assert {"logits_processors", "logprobs_mode", "speculative_config"} <= names
assert {"extra_args", "seed"} <= sampling
older, newer = logits_processor(), newer_logits_processor()
assert older.__abstractmethods__ <= {"__init__", "apply", "is_argmax_invariant", "update_state"}
assert parameters(older.apply) == ["self", "logits"]
assert parameters(process_dict_updates()) == ["req_entries", "batch_update", "new_state"]
if newer is not None:
    assert newer.__abstractmethods__ <= {"apply"}
    assert parameters(newer.apply) == ["self", "logits", "ctx"]
    assert parameters(newer.add_request) == ["self", "req_idx", "sampling_params"]
    where = "vllm.v1.worker.gpu.sample.logits_processor"
    has(find(where, "LogitsContext"), "idx_mapping_np input_ids pos")
    has(find(where, "LogitsProcRequestState"), "all_token_ids prompt_len prefill_len")

# Outputs and numbers.
has(RequestOutput, "outputs finished num_cached_tokens prompt_logprobs")
has(CompletionOutput, "index text token_ids logprobs finish_reason stop_reason")
has(Logprob, "logprob rank")
record = parameters(vllm.StatLoggerBase.record)
assert record[1:] == ["scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"]
assert vllm.StatLoggerBase.__abstractmethods__ <= {"__init__", "record", "log_engine_initialized"}
has(SchedulerStats, "num_running_reqs kv_cache_usage prefix_cache_stats")
has(IterationStats, "num_preempted_reqs")
has(PrefixCacheStats, "queries hits")
has(MultiModalCacheStats, "queries hits")

# Parsers.
assert tool_parser_names() == set(ToolParserManager.list_registered()) > {"hermes", "qwen3_coder", "kimi_k2"}
assert reasoning_parser_names() == set(ReasoningParserManager.list_registered()) > {"qwen3", "granite"}
parsing = load_parsing()
kind = parsing.ParserManager.get_parser(
    tool_parser_name="hermes", reasoning_parser_name="granite", enable_auto_tools=True, is_harmony=False
)
delta = ["delta_text", "delta_token_ids", "request", "prompt_token_ids", "finished"]
assert parameters(kind.parse_delta)[1:] == delta
assert {"enable_auto_tools", "model_output_token_ids"} <= set(parameters(kind.parse))
request = parsing.ChatCompletionRequest(
    messages=[{"role": "user", "content": ""}], tool_choice="none", skip_special_tokens=True
)
assert request.skip_special_tokens

print("version", vllm.version)
