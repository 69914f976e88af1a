"""What is wrong is told whole, with a way out."""

import re
from pathlib import Path

import pytest

from properties.configuration import Configuration, ConfigurationError, resolve


def configure(*options: str, **environ: str) -> Configuration:
    return resolve(model="org/model", environ=environ, options=options)


def test_all_problems_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "serving.properties").write_text("option.dtype=fp8\nminWorkers=3\nmaxWorkers=2\n")
    with pytest.raises(ConfigurationError) as raised:
        resolve(
            model=str(tmp_path),
            environ={"OPTION_GPU_MEMORY_UTILIZATION": "7", "OPTION_CHAT_TEMPLATE": "none.jinja"},
            options=["port=x", "nonsense"],
        )
    text = str(raised.value)
    assert len(raised.value.problems) == 6
    assert text.startswith("6 problems in the configuration:")
    for part in ("fp8", "serving.properties line 2", "OPTION_GPU_MEMORY_UTILIZATION", "none.jinja", "port"):
        assert part in text


@pytest.mark.parametrize(
    ("variable", "suggestion"),
    [
        ("OPTION_ROLLING_BACK", "OPTION_ROLLING_BATCH"),
        ("OPTION_MAX_MODLE_LEN", "OPTION_MAX_MODEL_LEN"),
        ("OPTION_TENSOR_PARALLEL_SIZ", "OPTION_TENSOR_PARALLEL_SIZE"),
        ("OPTION_JOB_QUEUE_SIZE", "SERVING_JOB_QUEUE_SIZE"),
        ("SERVING_DTYPE", "OPTION_DTYPE"),
        ("SERVING_JOB_QEUE_SIZE", "SERVING_JOB_QUEUE_SIZE"),
        ("OPTION_Dtype", "OPTION_DTYPE"),
        ("SERVING_minWorkers", "SERVING_MIN_WORKERS"),
    ],
)
def test_unknown_variable_is_a_warning_with_the_nearest_name(variable: str, suggestion: str) -> None:
    found = configure(**{variable: "1"})
    assert [str(warning) for warning in found.warnings] == [f"{variable}: no such option; did you mean {suggestion}?"]


def test_unknown_name_in_the_file_tells_the_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "serving.properties").write_text("\noption.max_modle_len=5\ndtype=fp16\n")
    found = resolve(model=str(tmp_path), environ={})
    assert [str(warning) for warning in found.warnings] == [
        "option.max_modle_len (serving.properties line 2): no such option; did you mean option.max_model_len?",
        "dtype (serving.properties line 3): no such option; did you mean option.dtype?",
    ]


def test_nothing_is_suggested_for_what_is_like_nothing() -> None:
    found = configure(OPTION_ZZZ="1")
    assert [str(warning) for warning in found.warnings] == ["OPTION_ZZZ: no such option"]


def test_an_option_of_vllm_is_told_from_a_misspelt_one_where_vllm_is_not_installed() -> None:
    found = configure("kv_cache_metrics=true", OPTION_HF_OVERRIDES="{}")
    assert [str(warning) for warning in found.warnings] == [
        "option.kv_cache_metrics (--option kv_cache_metrics): an option of vLLM, which is not installed here",
        "OPTION_HF_OVERRIDES: an option of vLLM, which is not installed here",
    ]
    known = resolve(
        model="org/model",
        environ={"OPTION_HF_OVERRIDES": "{}"},
        backend_options=frozenset({"hf_overrides"}),
    )
    assert known.warnings == []
    assert [str(warning) for warning in known.unhonoured("rolling")] == [
        "option.hf_overrides (OPTION_HF_OVERRIDES) has no effect with the rolling backend; honoured by: vllm"
    ]
    with pytest.raises(ConfigurationError, match="OPTION_HF_OVERRIDES: an option of vLLM"):
        configure(SERVING_STRICT_OPTIONS="true", OPTION_HF_OVERRIDES="{}")


def test_unknown_options_are_kept_with_their_source() -> None:
    found = configure("stream_interval=2", OPTION_STREAM_INTERVAL="3 ", OPTION_ENABLE_EXPERT_PARALLEL="true")
    assert found.extra["stream_interval"].value == "2"
    assert found.extra["stream_interval"].kind == "command line"
    assert found.extra["enable_expert_parallel"].location == "OPTION_ENABLE_EXPERT_PARALLEL"


def test_strict_options_turn_unknown_names_into_errors() -> None:
    with pytest.raises(ConfigurationError) as raised:
        configure(SERVING_STRICT_OPTIONS="true", OPTION_DTIPE="1", OPTION_ZZZ="1")
    assert len(raised.value.problems) == 2
    assert "did you mean OPTION_DTYPE?" in str(raised.value)


def test_names_without_effect_warn_with_the_reason_even_when_strict() -> None:
    found = configure(SERVING_STRICT_OPTIONS="true", OPTION_MPI_MODE="true", SERVING_BATCH_SIZE="4")
    texts = sorted(str(warning) for warning in found.warnings)
    assert texts[0].startswith("OPTION_MPI_MODE: option.mpi_mode has no effect here: ")
    assert texts[1].startswith("SERVING_BATCH_SIZE: batch_size has no effect here: ")


@pytest.mark.parametrize(
    "variable",
    [
        "OPTION_BEDROCK_COMPAT",
        "OPTION_LMCACHE_CONFIG_FILE",
        "OPTION_LMCACHE_AUTO_CONFIG",
        "OPTION_SESSIONS_PATH",
        "OPTION_SESSIONS_S3URL",
        "OPTION_ENABLE_VENV",
        "OPTION_SWAP_SPACE",
        "OPTION_DEVICE",
        "OPTION_NUM_SCHEDULER_STEPS",
        "OPTION_GUIDED_DECODING_BACKEND",
        "OPTION_ROPE_SCALING",
        "OPTION_PYTHON_EXECUTABLE",
        "SERVING_BAD_REQUEST_HTTP_CODE",
        "SERVING_WLM_ERROR_HTTP_CODE",
        "SERVING_THROTTLE_ERROR_HTTP_CODE",
        "SERVING_SERVER_ERROR_HTTP_CODE",
        "SERVING_TIMEOUT_HTTP_CODE",
        "SERVING_ERROR_RATE_WLM",
        "SERVING_ERROR_RATE_SERVER",
        "SERVING_ERROR_RATE_MODEL",
        "SERVING_ERROR_RATE_ANY",
    ],
)
def test_what_lmi_has_and_this_server_has_not_is_said_with_the_reason(variable: str) -> None:
    (warning,) = configure(**{variable: "1"}).warnings
    name = variable.partition("_")[2].lower()
    assert re.fullmatch(rf"{variable}: (option\.)?{name} has no effect here: .{{10,}}", str(warning))


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("option.max_output_size", "replies have no limit of bytes"),
        ("option.max_num_tokens", "write option.max_rolling_batch_prefill_tokens"),
        ("option.n_positions", "write option.max_model_len"),
        ("option.max_tokens", "write option.max_model_len"),
        ("option.enable_kv_cache_reuse", "write option.enable_prefix_caching"),
        ("option.smoothquant_alpha", "models are not calibrated here"),
        ("option.batch_scheduler_policy", "TensorRT-LLM's"),
        ("option.compiled_graph_path", "for Neuron devices"),
        ("option.training_mp_size", "DeepSpeed's"),
        ("option.max_sparsity", "LMI's sequence scheduler"),
        ("option.mapLocation", "DJL's engines for other kinds of models"),
        ("option.speculative_length", "write option.speculative_config"),
        ("translatorFactory", "DJL's engines for other kinds of models"),
        ("max_batch_delay", "always share a rolling batch"),
        ("gpu.maxWorkers", "write minWorkers and maxWorkers"),
        ("keystore", "end TLS in front of the server"),
        ("plugin_folder", "DJL's Java server"),
    ],
)
def test_what_djl_and_lmi_know_gets_a_true_answer(tmp_path: Path, key: str, told: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "serving.properties").write_text(f"{key}=1\n")
    for found in (
        resolve(model=str(tmp_path), environ={"SERVING_STRICT_OPTIONS": "true"}),
        configure(**{("OPTION_" if key[:7] == "option." else "SERVING_") + key.removeprefix("option.").upper(): "1"}),
    ):
        (warning,) = found.warnings
        assert "has no effect here: " in str(warning)
        assert told in str(warning)
        assert "did you mean" not in str(warning)


@pytest.mark.parametrize(
    ("key", "name", "text"),
    [
        ("option.s3url", "model_id", "s3://bucket/m/"),
        ("option.model_id_or_path", "model_id", "org/m"),
        ("option.data_type", "dtype", "float16"),
        ("option.huggingface_token", "hf_token", "hf_secret"),
    ],
)
def test_an_old_name_does_what_the_new_one_does(tmp_path: Path, key: str, name: str, text: str) -> None:
    (tmp_path / "serving.properties").write_text(
        f"{key}={text}\noption.model_id=org/m\n" if name == "dtype" else f"{key}={text}\n"
    )
    environ = {"HF_MODEL_ID": "org/m"} if name == "hf_token" else {}
    found = resolve(model=None, environ=environ, model_store=tmp_path)
    got = getattr(found.settings, name)
    assert (got.get_secret_value() if name == "hf_token" else got) == text
    assert found.sources[name].location == "serving.properties line 1"
    assert [str(warning) for warning in found.warnings] == [
        f"serving.properties line 1: {key} is deprecated: write option.{name}"
    ]
    assert "hf_secret" not in repr(found)


def test_an_old_name_and_the_new_one_must_agree(tmp_path: Path) -> None:
    (tmp_path / "serving.properties").write_text("option.s3url=s3://a/b\noption.model_id=s3://a/c\n")
    told = r"option.model_id has two different values: option.s3url = 's3://a/b' .* and option.model_id = 's3://a/c'"
    with pytest.raises(ConfigurationError, match=told):
        resolve(model=None, environ={}, model_store=tmp_path)


def test_names_of_the_java_server_are_silent() -> None:
    assert configure(SERVING_OPTS="-Dx=y", SERVING_FEATURES="vllm").warnings == []


def test_two_spellings_may_say_the_same() -> None:
    found = configure("tensor_parallel_degree=2", "tensor_parallel_size=2.0", "max_num_seqs=32")
    assert found.settings.tensor_parallel_degree == 2
    assert found.settings.max_rolling_batch_size == 32


def test_two_spellings_that_differ_are_both_named() -> None:
    with pytest.raises(ConfigurationError) as raised:
        configure(OPTION_MAX_ROLLING_BATCH_SIZE="4", OPTION_MAX_NUM_SEQS="5")
    (problem,) = raised.value.problems
    assert problem.option == "max_rolling_batch_size"
    for part in ("OPTION_MAX_ROLLING_BATCH_SIZE", "OPTION_MAX_NUM_SEQS", "'4'", "'5'"):
        assert part in str(problem)


def test_secrets_never_show() -> None:
    with pytest.raises(ConfigurationError) as raised:
        configure("api_key=first", "port=x", VLLM_API_KEY="third", APHRODITE_API_KEY="fourth")
    assert "first" not in str(raised.value)
    with pytest.raises(ConfigurationError, match=r"\*\*\*\*") as raised:
        configure(VLLM_API_KEY="third", APHRODITE_API_KEY="fourth")
    assert "third" not in str(raised.value)
    assert "hf_abc" not in " ".join(map(str, configure(OPTION_HF_TOKENN="hf_abc").warnings))


def test_tool_choice_needs_a_parser() -> None:
    with pytest.raises(
        ConfigurationError, match=r"option\.enable_auto_tool_choice = true \(.*needs option\.tool_call_parser"
    ):
        configure("enable_auto_tool_choice=true")
    assert configure("enable_auto_tool_choice=true", "tool_call_parser=hermes").warnings == []


def test_chat_template_may_be_text_or_a_path(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ x }}")
    assert configure(f"chat_template={path}").settings.chat_template == str(path)
    assert configure("chat_template={% for m in messages %}").settings.chat_template is not None
    with pytest.raises(ConfigurationError, match="no such file"):
        configure(f"chat_template={tmp_path}/missing.jinja")


def test_options_of_another_backend_are_named() -> None:
    found = configure("max_loras=2", "encoder_cache_mb=64", "load_format=auto")
    assert [problem.option for problem in found.unhonoured("rolling")] == ["max_loras"]
    assert [problem.option for problem in found.unhonoured("vllm")] == ["encoder_cache_mb"]


@pytest.mark.parametrize("entry", ["http://host/model.py", "https://host/model.py", "missing.py"])
def test_an_entry_point_must_be_a_file_of_the_model(tmp_path: Path, entry: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"option\.entry_point = .*: no such file in "):
        resolve(model=str(tmp_path), environ={}, options=[f"entryPoint={entry}"])


def test_inference_address_must_be_http() -> None:
    with pytest.raises(ConfigurationError, match=r"allowed: http://HOST:PORT"):
        configure(SERVING_INFERENCE_ADDRESS="unix:/tmp/s")
