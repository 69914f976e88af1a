"""The variables of AWS's vLLM and SGLang containers are options here."""

from pathlib import Path
from typing import Any

import pytest

from properties.configuration import Configuration, resolve
from properties.problem import ConfigurationError
from properties.settings import Settings
from properties.sources import SGLANG


def configure(environ: dict[str, str], *options: str, backend_options: frozenset[str] = frozenset()) -> Configuration:
    return resolve(model="org/model", environ=environ, options=options, backend_options=backend_options)


def texts(found: Configuration) -> list[str]:
    return [str(warning) for warning in found.warnings]


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("SM_VLLM_MAX_MODEL_LEN", "4096", "max_model_len", 4096),
        ("SM_VLLM_MAX_MODEL_LEN", "8k", "max_model_len", 8000),
        ("SM_VLLM_MAX_MODEL_LEN", "1K", "max_model_len", 1024),
        ("SM_VLLM_MAX_MODEL_LEN", "25.6k", "max_model_len", 25600),
        ("SM_VLLM_MAX_NUM_BATCHED_TOKENS", "2K", "max_rolling_batch_prefill_tokens", 2048),
        ("SM_VLLM_MAX_NUM_BATCHED_TOKENS", "1m", "max_rolling_batch_prefill_tokens", 1_000_000),
        ("SM_SGLANG_CONTEXT_LENGTH", "2k", "max_model_len", 2000),
        ("SM_VLLM_TENSOR_PARALLEL_SIZE", "2", "tensor_parallel_degree", 2),
        ("SM_VLLM_MAX_NUM_SEQS", "8", "max_rolling_batch_size", 8),
        ("SM_VLLM_MAX_NUM_BATCHED_TOKENS", "2048", "max_rolling_batch_prefill_tokens", 2048),
        ("SM_VLLM_GPU_MEMORY_UTILIZATION", "0.8", "gpu_memory_utilization", 0.8),
        ("SM_VLLM_QUANTIZATION", "fp8", "quantize", "fp8"),
        ("SM_VLLM_DTYPE", "half", "dtype", "float16"),
        ("SM_VLLM_ENFORCE_EAGER", "true", "enforce_eager", True),
        ("SM_VLLM_TRUST_REMOTE_CODE", "True", "trust_remote_code", True),
        ("SM_VLLM_ENABLE_PREFIX_CACHING", "false", "enable_prefix_caching", False),
        ("SM_VLLM_NO_ENABLE_PREFIX_CACHING", "true", "enable_prefix_caching", False),
        ("SM_VLLM_SERVED_MODEL_NAME", '["a", "b"]', "served_model_name", ["a", "b"]),
        ("SM_VLLM_LIMIT_MM_PER_PROMPT", '{"image": 4}', "limit_mm_per_prompt", {"image": 4, "video": 0, "audio": 0}),
        ("SM_VLLM_SPECULATIVE_CONFIG", '{"method": "ngram"}', "speculative_config", {"method": "ngram"}),
        ("SM_VLLM_ALLOWED_ORIGINS", '["*"]', "cors_allowed_origin", ["*"]),
        ("SM_VLLM_PORT", "9000", "port", 9000),
        ("SM_SGLANG_CONTEXT_LENGTH", "4096", "max_model_len", 4096),
        ("SM_SGLANG_TP", "2", "tensor_parallel_degree", 2),
        ("SM_SGLANG_TP_SIZE", "2", "tensor_parallel_degree", 2),
        ("SM_SGLANG_MEM_FRACTION_STATIC", "0.7", "gpu_memory_utilization", 0.7),
        ("SM_SGLANG_MAX_RUNNING_REQUESTS", "16", "max_rolling_batch_size", 16),
        ("SM_SGLANG_CHUNKED_PREFILL_SIZE", "512", "max_rolling_batch_prefill_tokens", 512),
        ("SM_SGLANG_CHUNKED_PREFILL_SIZE", "-1", "enable_chunked_prefill", False),
        ("SM_SGLANG_DISABLE_RADIX_CACHE", "true", "enable_prefix_caching", False),
        ("SM_SGLANG_DISABLE_CUDA_GRAPH", "true", "enforce_eager", True),
        ("SM_SGLANG_TRUST_REMOTE_CODE", "true", "trust_remote_code", True),
        ("SM_SGLANG_REASONING_PARSER", "deepseek-r1", "reasoning_parser", "deepseek_r1"),
        ("SM_SGLANG_TOOL_CALL_PARSER", "qwen25", "tool_call_parser", "hermes"),
        ("SM_SGLANG_TOOL_CALL_PARSER", "llama3", "enable_auto_tool_choice", True),
    ],
)  # fmt: skip
def test_a_flags_variable_is_its_option(variable: str, text: str, name: str, value: Any) -> None:
    found = configure({variable: text})
    assert getattr(found.settings, name) == value
    assert found.sources[name].location == variable
    assert found.sources[name].kind == "vLLM or SGLang container variable"
    assert found.warnings == []


def test_every_flag_of_sglangs_that_is_translated_names_an_option() -> None:
    assert set(SGLANG.values()) <= set(Settings.model_fields)


def test_what_goes_before_and_after_them() -> None:
    both = {"SM_VLLM_MAX_MODEL_LEN": "1", "MAX_TOTAL_TOKENS": "2"}
    assert configure(both).settings.max_model_len == 1
    assert configure({**both, "OPTION_MAX_MODEL_LEN": "3"}).settings.max_model_len == 3
    devices = {"SM_VLLM_TENSOR_PARALLEL_SIZE": "2", "TENSOR_PARALLEL_DEGREE": "4"}
    assert configure(devices).settings.tensor_parallel_degree == 2
    with pytest.raises(ConfigurationError, match=r"two different values: .*SM_VLLM_DTYPE.*SM_SGLANG_DTYPE"):
        configure({"SM_VLLM_DTYPE": "half", "SM_SGLANG_DTYPE": "bfloat16"})


def test_false_leaves_out_a_flag_that_is_no_switch() -> None:
    found = configure({"SM_VLLM_QUANTIZATION": "false", "SM_SGLANG_DISABLE_RADIX_CACHE": "false"})
    assert (found.settings.quantize, found.settings.enable_prefix_caching) == (None, True)
    assert found.sources["enable_prefix_caching"].kind == "default"


def test_a_bad_value_names_the_variable() -> None:
    with pytest.raises(ConfigurationError, match=r"option.max_model_len = 'long' \(SM_VLLM_MAX_MODEL_LEN\)"):
        configure({"SM_VLLM_MAX_MODEL_LEN": "long"})


@pytest.mark.parametrize("text", ["auto", "AUTO", "-1"])
def test_an_automatic_length_is_as_if_not_written(text: str) -> None:
    found = configure({"SM_VLLM_MAX_MODEL_LEN": text, "MAX_TOTAL_TOKENS": "2"})
    assert found.settings.max_model_len is None
    assert found.sources["max_model_len"].kind == "default"
    model = found.with_model_config({"max_position_embeddings": 64})
    assert model.effective("max_model_len") == configure({}).with_model_config(
        {"max_position_embeddings": 64}
    ).effective("max_model_len")


def test_a_length_on_the_command_line_has_the_same_suffixes() -> None:
    assert configure({}, "--max-model-len=1k").settings.max_model_len == 1000
    with pytest.raises(ConfigurationError, match=r"no parts of K; 1\.5k is allowed"):
        configure({}, "--max-model-len=1.5K")
    for bad in ("0k", "k", "1kk", "-1k", "9" * 10 + "T"):
        with pytest.raises(ConfigurationError, match=r"allowed: a whole number from 1, or one such as 8k"):
            configure({}, f"max_model_len={bad}")
    with pytest.raises(ConfigurationError, match="max_rolling_batch_prefill_tokens = 'auto'"):
        configure({"SM_VLLM_MAX_NUM_BATCHED_TOKENS": "auto"})


def test_vllms_own_fields_reach_vllm() -> None:
    known = frozenset({"max_logprobs", "hf_overrides"})
    environ = {"SM_VLLM_MAX_LOGPROBS": "5", "SM_VLLM_HF_OVERRIDES": '{"a": 1}'}
    found = configure(environ, backend_options=known)
    assert {name: item.value for name, item in found.extra.items()} == {
        "max_logprobs": "5",
        "hf_overrides": '{"a": 1}',
    }
    assert found.warnings == []


def test_what_has_no_effect_says_so() -> None:
    assert texts(configure({"SM_VLLM_MAX_MODLE_LEN": "1"})) == [
        "SM_VLLM_MAX_MODLE_LEN: no such option; did you mean SM_VLLM_MAX_MODEL_LEN?"
    ]
    assert texts(configure({"SM_VLLM_DISABLE_LOG_STATS": "true"})) == [
        "SM_VLLM_DISABLE_LOG_STATS has no effect here: no answer depends on it"
    ]
    (warning,) = texts(configure({"SM_VLLM_LORA_MODULES": "a=b"}))
    assert warning.startswith("SM_VLLM_LORA_MODULES has no effect here: put adapters into")
    assert "end TLS in front of the server" in texts(configure({"SM_VLLM_SSL_KEYFILE": "key.pem"}))[0]
    tokenizer = configure({"SM_VLLM_TOKENIZER": "org/other"}, backend_options=frozenset({"tokenizer"}))
    assert texts(tokenizer) == ["SM_VLLM_TOKENIZER has no effect here: the tokenizer is the model's own"]
    assert tokenizer.extra == {}
    assert texts(configure({"SM_VLLM_SKIP_TOKENIZER_INIT": "true"})) == [
        "SM_VLLM_SKIP_TOKENIZER_INIT has no effect here: prompts are tokenised here"
    ]
    assert texts(configure({"SM_SGLANG_ENABLE_DP_ATTENTION": "true"})) == [
        "SM_SGLANG_ENABLE_DP_ATTENTION has no effect here: SGLang's flag has no equivalent"
    ]
    assert "see option.kv_cache_memory_mb" in texts(configure({"SM_SGLANG_MAX_TOTAL_TOKENS": "1"}))[0]


def test_keys_are_hidden() -> None:
    found = configure({"SM_VLLM_API_KEY": "s3cret"})
    assert found.settings.api_key is not None
    assert found.sources["api_key"].raw == "********"
    assert "s3cret" not in repr(found)


class TestTheModel:
    @pytest.fixture
    def store(self, tmp_path: Path) -> Path:
        (tmp_path / "config.json").write_text("{}")
        return tmp_path

    @pytest.mark.parametrize("variable", ["SM_VLLM_MODEL", "SM_SGLANG_MODEL_PATH"])
    def test_the_containers_variable_comes_first(self, store: Path, variable: str) -> None:
        found = resolve(model=None, environ={variable: "org/m", "HF_MODEL_ID": "org/other"}, model_store=store)
        assert found.model_location.value == "org/m"
        assert found.sources["model_id"].location == variable

    def test_then_the_store_then_the_hubs(self, store: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        environ = {"HF_MODEL_ID": "org/m", "SM_VLLM_MAX_MODEL_LEN": "64"}
        found = resolve(model=None, environ=environ, model_store=store)
        assert found.model_location.value == str(store)
        assert f"HF_MODEL_ID is not used: beside SM_VLLM_* and SM_SGLANG_* variables, the model in {store}" in "".join(
            texts(found)
        )
        empty = tmp_path_factory.mktemp("store")
        assert resolve(model=None, environ=environ, model_store=empty).model_location.value == "org/m"

    @pytest.mark.parametrize(
        "variable", ["SM_VLLM_DISABLE_LOG_STATS", "SM_VLLM_LORA_MODULES", "SM_SGLANG_ENABLE_METRICS"]
    )
    def test_also_where_none_of_them_has_an_effect(self, store: Path, variable: str) -> None:
        environ = {"HF_MODEL_ID": "org/m", variable: "true"}
        assert resolve(model=None, environ=environ, model_store=store).model_location.value == str(store)

    def test_without_them_lmis_order_holds(self, store: Path) -> None:
        found = resolve(model=None, environ={"HF_MODEL_ID": "org/m"}, model_store=store)
        assert found.model_location.value == "org/m"

    def test_what_is_more_explicit_wins(self, store: Path) -> None:
        environ = {"SM_VLLM_MODEL": "org/m", "OPTION_MODEL_ID": "org/other"}
        assert resolve(model=None, environ=environ, model_store=store).model_location.value == "org/other"
