"""Configurations that LMI's guides publish, from 0.27 to the newest, mean here what they mean there."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.machine import computes_bfloat16
from handlers.backends.rolling.plan import plan_engines
from handlers.backends.select import choose_for
from handlers.custom.find import find_handler
from properties.configuration import Configuration, ConfigurationError, resolve
from properties.lmi import HANDLERS
from tests.support.live import LiveServer
from tests.support.shapes import SHAPES

LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
ASYNC = "djl_python.lmi_vllm.vllm_async_service"
LMCACHE = 'option.kv_transfer_config={"kv_connector":"LMCacheConnectorV1", "kv_role":"kv_both"}'


def read(tmp_path: Path, written: str | dict[str, str]) -> Configuration:
    """written: the text of a serving.properties beside the model, or an environment."""
    (tmp_path / "config.json").write_text(json.dumps(LLAVA))
    if isinstance(written, str):
        (tmp_path / "serving.properties").write_text(written)
        return resolve(model=str(tmp_path), environ={})
    return resolve(model=None, environ=written, model_store=tmp_path / "none")


PUBLISHED: list[tuple[str, str | dict[str, str], dict[str, Any]]] = [
    ("vllm guide, async", "engine=Python\noption.tensor_parallel_degree=max", {"tensor_parallel_degree": "max"}),
    (
        "vllm guide, async, environment",
        {"HF_MODEL_ID": "org/m", "TENSOR_PARALLEL_DEGREE": "max"},
        {"tensor_parallel_degree": "max"},
    ),
    (
        "vllm guide since lmi 15",
        f"engine=Python\noption.async_mode=true\noption.rolling_batch=disable\noption.entryPoint={ASYNC}\n"
        "option.tensor_parallel_degree=max",
        {"max_rolling_batch_size": 256, "entry_point": None},
    ),
    (
        "stateful sessions guide",
        {
            "HF_MODEL_ID": "org/m", "OPTION_ASYNC_MODE": "true", "OPTION_ROLLING_BATCH": "disable",
            "OPTION_ENTRYPOINT": ASYNC, "OPTION_MAX_ROLLING_BATCH_SIZE": "32",
            "OPTION_TENSOR_PARALLEL_DEGREE": "max", "OPTION_SESSIONS_EXPIRATION": "3600",
        },
        {"max_rolling_batch_size": 32, "sessions_expiration": 3600},
    ),
    ("model configuration", "engine=Python\noption.async_mode=true\noption.rolling_batch=disable", {}),
    (
        "hosting examples, tools",
        f"engine=Python\noption.async_mode=true\noption.rolling_batch=disable\noption.entryPoint={ASYNC}\n"
        "option.tensor_parallel_degree=max\noption.enable_auto_tool_choice=true\noption.tool_call_parser=hermes\n"
        "option.max_model_len=32768\noption.max_rolling_batch_size=16\noption.trust_remote_code=true",
        {"tool_call_parser": "hermes", "max_rolling_batch_size": 16},
    ),
    (
        "vllm guide, Qwen3-VL",
        {
            "HF_MODEL_ID": "Qwen/Qwen3-VL-32B-Instruct", "OPTION_TENSOR_PARALLEL_DEGREE": "max",
            "VLLM_ATTENTION_BACKEND": "TORCH_SDPA", "OPTION_LIMIT_MM_PER_PROMPT": '{"image": 4, "video": 0}',
            "OPTION_MAX_ROLLING_BATCH_SIZE": "128", "OPTION_MAX_MODEL_LEN": "16384",
            "OPTION_GPU_MEMORY_UTILIZATION": "0.9",
        },
        {"limit_mm_per_prompt": {"image": 4, "video": 0, "audio": 0}, "max_rolling_batch_size": 128},
    ),
    (
        "vision guide",
        {"HF_MODEL_ID": "llava-hf/llava-v1.6-mistral-7b-hf", "OPTION_LIMIT_MM_PER_PROMPT": '{"image":2}'},
        {"limit_mm_per_prompt": {"image": 2, "video": 0, "audio": 0}},
    ),
    (
        "vision guide 0.29",
        {"HF_MODEL_ID": "llava-hf/llava-v1.6-mistral-7b-hf", "OPTION_IMAGE_PLACEHOLDER_TOKEN": "<image>"},
        {"image_placeholder_token": "<image>"},
    ),
    (
        "tests, llava 1.6",
        'option.limit_mm_per_prompt={"image": 4}\noption.gpu_memory_utilization=0.7\noption.enforce_eager=True\n'
        "option.tensor_parallel_degree=1",
        {"gpu_memory_utilization": 0.7, "enforce_eager": True},
    ),
    (
        "tests, pixtral",
        "option.max_model_len=8192\noption.max_rolling_batch_size=16\noption.tokenizer_mode=mistral\n"
        'option.limit_mm_per_prompt={"image": 4}',
        {"tokenizer_mode": "mistral"},
    ),
    (
        "starting guide 0.27",
        {"HF_MODEL_ID": "TheBloke/Llama-2-7B-fp16"},
        {"model_id": "TheBloke/Llama-2-7B-fp16"},
    ),
    ("model configuration, rolling batch", "engine=Python\noption.rolling_batch=auto\noption.max_rolling_batch_size=64",
     {"max_rolling_batch_size": 64}),
    ("engine guide 0.29", {"HF_MODEL_ID": "org/m", "OPTION_ENGINE": "Python", "OPTION_MPI_MODE": "true"}, {}),
    (
        "lora, vllm guide",
        "option.tensor_parallel_degree=max\noption.enable_lora=True\noption.max_loras=2\noption.max_lora_rank=64\n"
        "option.long_lora_scaling_factors=4.0\noption.gpu_memory_utilization=0.9\noption.max_model_len=16384",
        {"enable_lora": True, "max_loras": 2, "max_lora_rank": 64},
    ),
    ("lmcache guide", f"engine=Python\noption.tensor_parallel_degree=4\n{LMCACHE}", {"tensor_parallel_degree": 4}),
    (
        "streaming guide",
        "engine=Python\noption.dtype=fp16\noption.tensor_parallel_degree=1\noption.enable_streaming=true",
        {"dtype": "float16"},
    ),
    ("scheduler guide 0.29",
     "engine=MPI\noption.tensor_parallel_degree=1\noption.dtype=fp16\noption.trust_remote_code=true\n"
     "option.max_rolling_batch_size=64\noption.rolling_batch=scheduler\noption.max_sparsity=0.33\noption.max_splits=3\n"
     "option.decoding_strategy=contrastive", {"max_rolling_batch_size": 64}),
    ("accelerate guide 0.29", {"HF_MODEL_ID": "org/m", "OPTION_ROLLING_BATCH": "scheduler"}, {}),
    (
        "tensorrt guide 0.27",
        "engine=MPI\noption.tensor_parallel_degree=max\noption.rolling_batch=trtllm\noption.max_rolling_batch_size=64\n"
        "option.max_input_len=1024\noption.max_output_len=512",
        {"max_rolling_batch_size": 64},
    ),
    (
        "tensorrt guide 0.28",
        {"HF_MODEL_ID": "org/m", "OPTION_ROLLING_BATCH": "trtllm", "OPTION_MAX_NUM_TOKENS": "50000"},
        {"max_rolling_batch_prefill_tokens": None},
    ),
    (
        "tensorrt guide, newest",
        "engine=Python\noption.mpi_mode=true\noption.tensor_parallel_degree=max\noption.max_num_tokens=50000",
        {},
    ),
    (
        "tensorrt, asynchronous",
        "option.async_mode=true\noption.rolling_batch=disable\n"
        "option.entryPoint=djl_python.lmi_trtllm.trtllm_async_service",
        {},
    ),
    (
        "deepspeed guide 0.28",
        "engine=MPI\noption.entryPoint=djl_python.deepspeed\noption.tensor_parallel_degree=max\n"
        "option.rolling_batch=deepspeed\noption.max_rolling_batch_size=64",
        {"max_rolling_batch_size": 64, "entry_point": None},
    ),
    (
        "deepspeed guide 0.28, environment",
        {
            "HF_MODEL_ID": "org/m", "OPTION_ENTRYPOINT": "djl_python.deepspeed", "TENSOR_PARALLEL_DEGREE": "max",
            "OPTION_ROLLING_BATCH": "deepspeed", "OPTION_MAX_ROLLING_BATCH_SIZE": "64",
        },
        {"max_rolling_batch_size": 64},
    ),
    ("deepspeed's deprecation", {"HF_MODEL_ID": "org/m", "OPTION_ENGINE": "DeepSpeed"}, {"engine": "Python"}),
    (
        "notebooks of 2023",
        "engine=DeepSpeed\noption.entryPoint=djl_python.deepspeed\noption.tensor_parallel_degree=4\n"
        "option.s3url=s3://bucket/gpt-j-6b/\noption.dtype=fp16\noption.max_tokens=1024\noption.enable_cuda_graph=false\n"
        "option.triangular_masking=true\noption.return_tuple=true\noption.training_mp_size=1\noption.checkpoint=ds.json",
        {"model_id": "s3://bucket/gpt-j-6b/", "dtype": "float16"},
    ),
    (
        "neuron guide 0.29",
        "engine=Python\noption.entryPoint=djl_python.transformers_neuronx\noption.rolling_batch=auto\n"
        "option.tensor_parallel_degree=4\noption.max_rolling_batch_size=8\noption.model_loading_timeout=1600",
        {"max_rolling_batch_size": 8, "model_loading_timeout": 1600},
    ),
    (
        "neuron tutorial 0.28",
        "engine=Python\noption.entryPoint=djl_python.transformers_neuronx\noption.tensor_parallel_degree=24\n"
        "option.n_positions=512\noption.rolling_batch=auto\noption.max_rolling_batch_size=8\n"
        "option.enable_mixed_precision_accumulation=true\noption.model_loading_timeout=12000\n"
        "option.save_mp_checkpoint_path=/opt/ml/input/data/training/partition-test",
        {"tensor_parallel_degree": 24},
    ),
    (
        "configurations 0.28, neuron",
        {
            "HF_MODEL_ID": "tiiuae/falcon-40b", "OPTION_ENTRYPOINT": "djl_python.transformersneuronx",
            "HF_MODEL_TRUST_REMOTE_CODE": "true", "TENSOR_PARALLEL_DEGREE": "4",
            "OPTION_MAX_ROLLING_BATCH_SIZE": "32", "OPTION_ROLLING_BATCH": "auto",
        },
        {"trust_remote_code": True},
    ),
    (
        "accelerate guide",
        {"HF_MODEL_ID": "org/m", "TENSOR_PARALLEL_DEGREE": "max", "OPTION_ENTRYPOINT": "djl_python.huggingface"},
        {},
    ),
    (
        "model configuration, all of it",
        "option.modeName=resnet18_v1\noption.mapLocation=true\noption.extraFiles=foo.txt,bar.txt\n"
        "option.interOpNumThreads=2\noption.intraOpNumThreads=2\noption.executionMode=SEQUENTIAL\n"
        "option.optLevel=BASIC_OPT\noption.memoryPatternOptimization=true\noption.cpuArenaAllocator=true\n"
        "option.disablePerSessionThreads=true\noption.customOpLibrary=myops.so\noption.ortDevice=TensorRT\n"
        "retry_threshold=10\noption.pythonExecutable=python3\noption.predict_timeout=120\n"
        "option.model_loading_timeout=10\noption.parallel_loading=true\noption.tensor_parallel_degree=2\n"
        "option.enable_venv=true\noption.rolling_batch=auto\noption.max_rolling_batch_size=64\n"
        "option.max_output_size=67108864",
        {"retry_threshold": 10, "predict_timeout": 120},
    ),
    (
        "model configuration, queues",
        "job_queue_size=10\nbatch_size=2\nmax_batch_delay=1\nmax_idle_time=120\nminWorkers=2\nmaxWorkers=3\n"
        "gpu.minWorkers=2\ngpu.maxWorkers=3\ncpu.minWorkers=2\ncpu.maxWorkers=4\nload_on_devices=0",
        {"job_queue_size": 10, "max_workers": 3, "load_on_devices": [0], "max_rolling_batch_size": 256},
    ),
]  # fmt: skip
"""Where, what, and options that must come out. All of them mean the best backend, with full batching."""


@pytest.mark.parametrize(("written", "expected"), [case[1:] for case in PUBLISHED], ids=[case[0] for case in PUBLISHED])
def test_a_published_configuration_is_served_by_vllm_with_full_batching(
    tmp_path: Path, written: str | dict[str, str], expected: dict[str, Any]
) -> None:
    found = read(tmp_path, written)
    assert found.settings.rolling_batch == "auto"
    assert {name: getattr(found.settings, name) for name in expected} == expected
    assert choose_for(found, LLAVA, 1, vllm=True).backend == "vllm"
    assert choose_for(found, LLAVA, 0, vllm=False).backend == "rolling"
    batches = {engine.max_num_seqs for engine in plan_engines(found.settings, "", 0)}
    assert batches == {found.settings.max_rolling_batch_size}, "and by the embedded engine in its place"
    assert not [str(warning) for warning in found.warnings if "no such option" in str(warning)]


@pytest.mark.parametrize(
    "written",
    [
        "engine=Python\noption.tensor_parallel_degree=max\noption.rolling_batch=vllm\noption.max_rolling_batch_size=64",
        "engine=MPI\noption.tensor_parallel_degree=max\noption.rolling_batch=lmi-dist\noption.max_rolling_batch_size=64",
        {"HF_MODEL_ID": "org/m", "OPTION_ROLLING_BATCH": "vllm", "OPTION_ENABLE_AUTO_TOOL_CHOICE": "true",
         "OPTION_TOOL_CALL_PARSER": "llama3_json"},
        {"HF_MODEL_ID": "org/m", "OPTION_MPI_MODE": "true", "OPTION_ROLLING_BATCH": "lmi-dist",
         "OPTION_TENSOR_PARALLEL_DEGREE": "4"},
        f"option.async_mode=true\noption.rolling_batch=vllm\noption.entryPoint={ASYNC}",
    ],
)  # fmt: skip
def test_vllm_by_name_is_demanded_as_in_lmi(tmp_path: Path, written: str | dict[str, str]) -> None:
    found = read(tmp_path, written)
    assert found.settings.rolling_batch == "vllm"
    assert choose_for(found, LLAVA, 0, vllm=True).backend == "vllm"
    with pytest.raises(ConfigurationError, match="vLLM is not installed"):
        choose_for(found, LLAVA, 1, vllm=False)


@pytest.mark.parametrize(
    "written",
    [
        "option.rolling_batch=disable",
        "option.rolling_batch=disable\noption.async_mode=false",
        "option.rolling_batch=disable\noption.entryPoint=djl_python.huggingface",
        "option.rolling_batch=disable\noption.entryPoint=djl_python.tensorrt_llm",
        "option.rolling_batch=disable\nbatch_size=1",
    ],
)
def test_disable_alone_serves_one_request_at_a_time(tmp_path: Path, written: str) -> None:
    found = read(tmp_path, written)
    assert found.settings.rolling_batch == "disable"
    assert found.vllm_asked_by is None
    assert "one request at a time" in choose_for(found, LLAVA, 1, vllm=True).reason


def test_disable_beside_a_batch_size_is_dynamic_batching(tmp_path: Path) -> None:
    found = read(tmp_path, "option.rolling_batch=disable\nbatch_size=8\nmax_batch_delay=100")
    assert (found.settings.rolling_batch, found.settings.max_rolling_batch_size) == ("rolling", 8)
    assert found.sources["max_rolling_batch_size"].location == "serving.properties line 2"
    assert not [warning for warning in found.warnings if ": batch_size" in str(warning)]
    more = read(tmp_path, "option.rolling_batch=disable\nbatch_size=8\noption.max_rolling_batch_size=4")
    assert more.settings.max_rolling_batch_size == 4


def test_a_bad_batch_size_is_told_by_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"  batch_size = 'abc' \(serving.properties line 2\): allowed"):
        read(tmp_path, "option.rolling_batch=disable\nbatch_size=abc")
    with pytest.raises(ConfigurationError, match=r"  option.data_type = 'int3' "):
        read(tmp_path, "option.data_type=int3")


@pytest.mark.parametrize("entry", ["djl_python.lmi_vllm", "djl_python.async_service", "djl_python.LMI_vLLM.x"])
def test_the_asynchronous_handler_by_less_than_its_whole_name(tmp_path: Path, entry: str) -> None:
    found = read(tmp_path, f"option.rolling_batch=disable\noption.entryPoint={entry}")
    assert found.settings.rolling_batch == "auto"
    assert found.vllm_asked_by == f"option.entryPoint = {entry} (serving.properties line 2)"


def test_lmis_recommended_settings_need_no_warning(tmp_path: Path) -> None:
    found = read(tmp_path, f"option.async_mode=true\noption.rolling_batch=disable\noption.entryPoint={ASYNC}\n")
    assert found.warnings == []
    assert found.without_effect("vllm") == found.without_effect("rolling") == []
    assert found.sources["rolling_batch"].location == (
        f"serving.properties line 2, beside option.entryPoint = {ASYNC} (serving.properties line 3)"
    )


def test_why_vllm_does_not_serve_what_asks_for_it(tmp_path: Path) -> None:
    found = read(tmp_path, "option.async_mode=TRUE\noption.rolling_batch=Disable\n")
    assert choose_for(found, LLAVA, 1, vllm=False).reason == (
        "option.async_mode = TRUE (serving.properties line 1) asks for vLLM, but vLLM is not installed"
    )
    assert "no accelerator is visible" in choose_for(found, LLAVA, 0, vllm=True).reason
    fuyu = {"architectures": ["FuyuForCausalLM"]}
    assert "asks for vLLM, but vLLM 0.25 was the last" in choose_for(found, fuyu, 1, vllm=True).reason


@pytest.mark.parametrize("name", [name for name, handler in HANDLERS.items() if handler.note])
def test_every_handler_of_lmis_gets_a_true_answer(tmp_path: Path, name: str) -> None:
    written, reason = f"option.entryPoint=djl_python.{name}\n", HANDLERS[name].note
    if HANDLERS[name].refused:
        with pytest.raises(ConfigurationError, match=f"entry_point = 'djl_python.{name}' .*{reason}"):
            read(tmp_path, written)
        return
    (warning,) = read(tmp_path, written).warnings
    assert f"'djl_python.{name}' (serving.properties line 1) is deprecated: {reason}" in str(warning)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("djl_python.nothing", "not a handler of LMI's; allowed: a Python file, or djl_python.lmi_vllm"),
        ("huggingface.py", "no such file in .*; LMI's own handler is written djl_python.huggingface"),
        ("deepspeed.py", "written djl_python.deepspeed"),
        ("djl_python", "not a handler of LMI's"),
        ("djl_python.async_foo", "not a handler of LMI's"),
        ("djl_python.asynchronous", "not a handler of LMI's"),
    ],
)
def test_an_entry_point_that_is_none(tmp_path: Path, entry: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        read(tmp_path, f"option.entryPoint={entry}")


@pytest.mark.parametrize("entry", [ASYNC, "djl_python.huggingface"])
def test_a_handler_of_lmis_comes_before_the_models_own(tmp_path: Path, entry: str) -> None:
    (tmp_path / "model.py").write_text("def handle(inputs): pass\n")
    assert find_handler(read(tmp_path, "")) is not None
    assert find_handler(read(tmp_path, f"option.entryPoint={entry}")) is None


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (
            f"option.task=text-embedding\noption.entryPoint={ASYNC}\noption.rolling_batch=disable",
            "option.task",
        ),
        ("engine=Rust\nbatch_size=32", "engine = 'Rust'"),
        ("engine=OnnxRuntime\ntranslatorFactory=x.TextEmbeddingTranslatorFactory", "engine = 'OnnxRuntime'"),
        ("option.entryPoint=djl_python.sklearn_handler\noption.model_format=skops", "generates text"),
    ],
)
def test_what_is_not_text_generation_is_refused(tmp_path: Path, written: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        read(tmp_path, written)


def test_the_start_says_what_serves_in_which_type_and_what_is_not_obeyed() -> None:
    options = (
        "async_mode=true",
        "rolling_batch=disable",
        f"entryPoint={ASYNC}",
        "gpu_memory_utilization=0.5",
    )
    environ = {
        "CUDA_VISIBLE_DEVICES": "",
        "SM_VLLM_LIMIT_MM_PER_PROMPT": '{"image":16,"video":2}',
        "SM_SGLANG_MAX_RUNNING_REQUESTS": "4",
    }
    with LiveServer(SHAPES, *options, "kv_cache_memory_mb=90000", **environ) as live:
        assert live.metrics()
    for line in (
        f"backend rolling: option.entryPoint = {ASYNC} (--option entryPoint) asks for vLLM, but ",
        "option.limit_mm_per_prompt (SM_VLLM_LIMIT_MM_PER_PROMPT) allows video, which is not served: only images are",
        "option.gpu_memory_utilization = 0.5 has no effect: no accelerator is visible",
        "of the 90000 MiB of kv_cache_memory_mb: 4 requests of ",
        ": as the model is stored" if computes_bfloat16("cpu") else "computing in float32: the model is stored in",
    ):
        assert line in live.log
