"""A script: whether one vLLM has every name, signature and attribute that is used of it. `test_compat.py` runs it.

What is only reached through an object (an engine's renderer, say) is looked for in the source of its class.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from vllm.config import CacheConfig, LoRAConfig, ModelConfig, ParallelConfig, VllmConfig
from vllm.logprobs import Logprob
from vllm.multimodal.inputs import MultiModalKwargsItem, PlaceholderRange
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import BaseProcessingInfo
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.reasoning import ReasoningParserManager
from vllm.renderers.base import BaseRenderer
from vllm.tool_parsers import ToolParserManager
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.coordinator import DPCoordinator
from vllm.v1.engine.core_client import BackgroundResources, MPClient
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.executor.multiproc_executor import WorkerProc
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, PrefixCacheStats, SchedulerStats
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

from handlers.backends.vllm.arguments import ALWAYS, GONE, WHERE_GIVEN
from handlers.backends.vllm.compat import (
    architectures,
    cpu_takes_block_size,
    engine_argument_names,
    load,
    load_parsing,
    logits_processor_classes,
    newer_runner_limits,
    parser_names,
    process_dict_updates,
    registered_names,
)
from handlers.backends.vllm.sampling import SAME, TRANSLATED
from properties.lmi import IGNORED

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
parser = vllm.AsyncEngineArgs.add_cli_args(vllm.FlexibleArgumentParser())
assert {"max_logprobs", "compilation_config"} <= {action.dest for action in parser._actions}
assert {"config_format", "hf_overrides", "mm_encoder_tp_mode", "mm_processor_cache_gb"} <= names
assert {
    "device_ids",
    "cudagraph_capture_sizes",
    "max_cudagraph_capture_size",
    "structured_outputs_config",
} <= names
# Files are never read, whatever vLLM would allow.
assert {name.removeprefix("option.") for name in IGNORED} & names == {"allowed_local_media_path"}
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
has(
    vllm.AsyncLLM,
    "reset_mm_cache renderer model_config vllm_config engine_core output_processor output_handler dead_error",
)
assert parameters(OutputProcessor.propagate_error) == ["self", "e"]
has(MPClient, "resources")
has(BackgroundResources, "engine_manager coordinator")
has(CoreEngineProcManager, "processes")
has(DPCoordinator, "proc")
# How `processes` knows what a start that failed has left, and which processes an engine cannot do without.
assert 'name="VLLM_DP_Coordinator"' in inspect.getsource(DPCoordinator)
assert "EngineCore" in inspect.getsource(CoreEngineProcManager.__init__)
assert 'process_name = "Worker"' in inspect.getsource(WorkerProc.setup_proc_title_and_log_prefix)
lora = vllm.LoRARequest("name", 7, "/path")
assert (lora.lora_name, lora.lora_int_id, lora.lora_path) == ("name", 7, "/path")
assert not issubclass(vllm.EngineDeadError, vllm.refusals), "an engine that died is no bad request"
assert not issubclass(vllm.GracefulHTTPError, vllm.refusals)

# Requests.
sampling = set(vllm.SamplingParams.__struct_fields__)
assert {*SAME, *TRANSLATED, "n", "output_kind", "structured_outputs", "detokenize"} <= sampling
assert {"json", "regex", "choice", "grammar", "json_object"} <= set(parameters(vllm.StructuredOutputsParams))
assert {"max_total_tokens", "add_special_tokens"} <= set(parameters(vllm.TokenizeParams))
assert parameters(vllm.parse_model_prompt)[:2] == ["model_config", "prompt"]
assert parameters(vllm.get_model_cls)[:1] == ["model_config"]
has(BaseRenderer, "get_mm_processor")
assert parameters(BaseRenderer.render_cmpl_async)[1:3] == ["prompts", "tok_params"]
# What makes an image that was rendered and never sent be sent again with the next request.
assert "mm_cache_miss_hashes" in EngineCoreOutput.__struct_fields__
assert "mm_processor_cache.invalidate(mm_hash)" in inspect.getsource(vllm.AsyncLLM)
has(BaseProcessingInfo, "supported_mm_limits data_parser")
has(PlaceholderRange, "offset length get_num_embeds")
has(ModelConfig, "get_inputs_embeds_size")
has(vllm.AsyncLLM, "input_processor")
has(InputProcessor, "mm_encoder_cache_size")
assert isinstance(MultiModalDataParser.embedding_fields, Mapping)
has(MultiModalKwargsItem, "get_data")

# The limits of its newer model runner.
has(VllmConfig, "use_v2_model_runner")
assert min(newer_runner_limits()) > 0
has(vllm.SamplingParams, "clone update_from_tokenizer bad_words_token_ids")
has(vllm.AsyncLLM, "get_tokenizer")

# Samplers of ours in its process.
assert {"logits_processors", "logprobs_mode", "speculative_config"} <= names
assert {"extra_args", "seed"} <= sampling
older, newer = logits_processor_classes()
assert older.__abstractmethods__ <= {"__init__", "apply", "is_argmax_invariant", "update_state"}
assert parameters(older.apply) == ["self", "logits"]
assert parameters(process_dict_updates()) == ["req_entries", "batch_update", "new_state"]
assert newer.__abstractmethods__ <= {"apply"}
assert parameters(newer.apply) == ["self", "logits", "ctx"]
assert parameters(newer.add_request) == ["self", "req_idx", "sampling_params"]
has(LogitsContext, "idx_mapping_np input_ids pos")
has(LogitsProcRequestState, "all_token_ids prompt_len prefill_len")

# Outputs and numbers.
has(RequestOutput, "outputs finished num_cached_tokens prompt_logprobs")
has(CompletionOutput, "index text token_ids logprobs finish_reason stop_reason")
has(Logprob, "logprob rank")
record = parameters(vllm.StatLoggerBase.record)
assert record[1:] == ["scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"]
assert vllm.StatLoggerBase.__abstractmethods__ <= {"__init__", "record", "log_engine_initialized"}
has(SchedulerStats, "kv_cache_usage prefix_cache_stats")
has(IterationStats, "num_preempted_reqs")
has(PrefixCacheStats, "queries hits")
has(MultiModalCacheStats, "queries hits")

# Parsers.
assert (
    parser_names("tool_call_parser") == set(ToolParserManager.list_registered()) > {"hermes", "qwen3_coder", "kimi_k2"}
)
assert parser_names("reasoning_parser") == set(ReasoningParserManager.list_registered()) > {"qwen3", "granite"}
parsing = load_parsing()
kind = parsing.ParserManager.get_parser(
    tool_parser_name="hermes", reasoning_parser_name="granite", enable_auto_tools=True, is_harmony=False
)
has(kind, "set_prompt_token_ids tool_parser")
assert callable(kind.tool_parser_cls.get_remaining_unstreamed_args)
delta = ["delta_text", "delta_token_ids", "request", "prompt_token_ids", "finished"]
assert parameters(kind.parse_delta)[1:] == delta
assert {"enable_auto_tools", "model_output_token_ids"} <= set(parameters(kind.parse))
request = parsing.ChatCompletionRequest(
    messages=[{"role": "user", "content": ""}], tool_choice="none", skip_special_tokens=True
)
assert request.skip_special_tokens

print("version", vllm.version)
