"""Each source wins over the next one below it."""

from pathlib import Path

import pytest

from properties.configuration import Configuration, ConfigurationError, resolve
from properties.field import Level

HUB = {"HF_MODEL_ID": "org/model"}


def configure(tmp_path: Path, file: str = "", options: tuple[str, ...] = (), **environ: str) -> Configuration:
    (tmp_path / "serving.properties").write_text(file)
    return resolve(model=None, environ={**HUB, **environ}, options=options, model_store=tmp_path)


def test_command_line_over_sagemaker(tmp_path: Path) -> None:
    found = configure(tmp_path, options=("predict_timeout=1",), SAGEMAKER_MODEL_SERVER_TIMEOUT_SECONDS="2")
    assert found.settings.predict_timeout == 1
    assert found.sources["predict_timeout"].kind == "command line"


def test_sagemaker_over_file(tmp_path: Path) -> None:
    found = configure(tmp_path, "option.predict_timeout=3\nminWorkers=3\n", SAGEMAKER_MODEL_SERVER_TIMEOUT_SECONDS="2")
    assert found.settings.predict_timeout == 2
    assert found.sources["predict_timeout"].location == "SAGEMAKER_MODEL_SERVER_TIMEOUT_SECONDS"
    assert found.settings.min_workers == 3


def test_file_over_environment_option(tmp_path: Path) -> None:
    found = configure(
        tmp_path,
        "# first\noption.predict_timeout=3\njob_queue_size=7\n",
        OPTION_PREDICT_TIMEOUT="4",
        SERVING_JOB_QUEUE_SIZE="8",
    )
    assert (found.settings.predict_timeout, found.settings.job_queue_size) == (3, 7)
    assert found.sources["predict_timeout"].location == "serving.properties line 2"


def test_file_over_environment_under_different_spellings(tmp_path: Path) -> None:
    found = configure(tmp_path, "option.max_num_seqs=3\n", OPTION_MAX_ROLLING_BATCH_SIZE="4")
    assert found.settings.max_rolling_batch_size == 3


def test_environment_option_over_dedicated_variable(tmp_path: Path) -> None:
    found = configure(tmp_path, OPTION_PREDICT_TIMEOUT="4", PREDICT_TIMEOUT="5")
    assert found.settings.predict_timeout == 4


def test_dedicated_variable_over_tgi_variable(tmp_path: Path) -> None:
    found = configure(tmp_path, TENSOR_PARALLEL_DEGREE="2", SM_NUM_GPUS="4")
    assert found.settings.tensor_parallel_degree == 2
    assert configure(tmp_path, SM_NUM_GPUS="4").settings.tensor_parallel_degree == 4


def test_tgi_variable_over_recommendation(tmp_path: Path) -> None:
    config = {"text_config": {"max_position_embeddings": 4096}}
    found = configure(tmp_path, MAX_BATCH_SIZE="9", OPTION_MAX_MODEL_LEN="100").with_model_config(config)
    assert found.settings.max_rolling_batch_size == 9
    assert found.settings.max_model_len == found.effective("max_model_len") == 100
    assert found.sources["max_model_len"].location == "OPTION_MAX_MODEL_LEN"


def test_recommendation_over_default(tmp_path: Path) -> None:
    found = configure(tmp_path).with_model_config({"text_config": {"max_position_embeddings": 4096}})
    assert found.effective("max_model_len") == 4096
    assert found.sources["max_model_len"].kind == "recommended from config.json"


def test_recommendation_leaves_the_choice_to_the_backend(tmp_path: Path) -> None:
    found = configure(tmp_path).with_model_config({"text_config": {"max_position_embeddings": 4096}})
    assert found.settings.max_model_len is None


def test_default_where_nobody_says(tmp_path: Path) -> None:
    found = configure(tmp_path)
    assert found.settings.predict_timeout == 240
    assert found.sources["predict_timeout"].level is Level.DEFAULT


def test_empty_value_is_absent_everywhere(tmp_path: Path) -> None:
    found = configure(
        tmp_path,
        "option.dtype=\noption.revision =   \n",
        options=("dtype=", "seed= "),
        OPTION_DTYPE="  ",
        HF_REVISION="",
        SAGEMAKER_STARTUP_TIMEOUT="",
        OPTION_SEED="3",
    )
    assert found.settings.dtype == "auto"
    assert found.settings.revision is None
    assert found.settings.seed == 3
    assert found.warnings == []


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("SAGEMAKER_NUM_MODEL_WORKERS", "3", "min_workers", 3),
        ("SAGEMAKER_NUM_MODEL_WORKERS", "3", "max_workers", 3),
        ("SAGEMAKER_STARTUP_TIMEOUT", "99", "model_loading_timeout", 99),
        ("SAGEMAKER_MAX_REQUEST_SIZE", "1000", "max_request_size", 1000),
        ("SAGEMAKER_MAX_PAYLOAD_IN_MB", "2", "max_request_size", 2 * 2**20),
        ("SAGEMAKER_BIND_TO_PORT", "9001", "port", 9001),
        ("SERVING_PORT", "9002", "port", 9002),
        ("SERVING_MIN_WORKERS", "2", "min_workers", 2),
        ("SERVING_INFERENCE_ADDRESS", "http://127.0.0.1:9003", "port", 9003),
        ("SERVING_INFERENCE_ADDRESS", "http://127.0.0.1:9003", "host", "127.0.0.1"),
        ("MODEL_LOADING_TIMEOUT", "98", "model_loading_timeout", 98),
        ("PREDICT_TIMEOUT", "97", "predict_timeout", 97),
        ("PIPELINE_PARALLEL_DEGREE", "2", "pipeline_parallel_degree", 2),
        ("HF_REVISION", "v1", "revision", "v1"),
        ("HF_MODEL_REVISION", "v2", "revision", "v2"),
        ("SM_NUM_GPUS", "2", "tensor_parallel_degree", 2),
        ("HF_TASK", "text-generation", "task", "text-generation"),
        ("HF_MODEL_QUANTIZE", "awq", "quantize", "awq"),
        ("HF_MODEL_TRUST_REMOTE_CODE", "true", "trust_remote_code", True),
        ("MAX_CONCURRENT_REQUESTS", "5", "job_queue_size", 5),
        ("MAX_BATCH_PREFILL_TOKENS", "4096", "max_rolling_batch_prefill_tokens", 4096),
        ("MAX_BATCH_SIZE", "6", "max_rolling_batch_size", 6),
        ("MAX_TOTAL_TOKENS", "512", "max_model_len", 512),
        ("PAYLOAD_LIMIT", "4096", "max_request_size", 4096),
        ("GRACEFUL_TERMINATION_TIMEOUT", "9", "drain_timeout", 9),
        ("CORS_ALLOW_ORIGIN", "https://a,https://b", "cors_allowed_origin", ["https://a", "https://b"]),
        ("SERVING_CORS_ALLOWED_ORIGIN", "*", "cors_allowed_origin", ["*"]),
        ("ENABLE_CUDA_GRAPHS", "true", "enforce_eager", False),
        ("ENABLE_CUDA_GRAPHS", "false", "enforce_eager", True),
        ("CUDA_MEMORY_FRACTION", "0.5", "gpu_memory_utilization", 0.5),
        ("APHRODITE_IMAGE_FETCH_TIMEOUT", "6", "image_fetch_timeout", 6),
        ("VLLM_IMAGE_FETCH_TIMEOUT", "7", "image_fetch_timeout", 7),
        ("OPTION_ENTRYPOINT", "mine.py", "entry_point", "mine.py"),
        ("OPTION_entryPoint", "mine.py", "entry_point", "mine.py"),
        ("OPTION_ENGINE", "Python", "engine", "Python"),
    ],
)
def test_every_variable_reaches_its_option(tmp_path: Path, variable: str, text: str, name: str, value: object) -> None:
    (tmp_path / "mine.py").touch()
    found = configure(tmp_path, **{variable: text})
    assert getattr(found.settings, name) == value
    assert found.sources[name].location == variable


def test_other_variables_of_tgi_are_nobodys(tmp_path: Path) -> None:
    others = {
        "MAX_BATCH_TOTAL_TOKENS": "9",
        "MAX_INPUT_TOKENS": "5",
        "MAX_BEST_OF": "1",
        "MAX_STOP_SEQUENCES": "1",
        "WAITING_SERVED_RATIO": "x",
        "VALIDATION_WORKERS": "0",
        "DISABLE_GRAMMAR_SUPPORT": "true",
        "JSON_OUTPUT": "true",
    }
    found = configure(tmp_path, **others)
    assert found.settings == configure(tmp_path).settings
    assert found.warnings == []


def test_sagemaker_request_size_wins_over_megabytes_with_a_warning(tmp_path: Path) -> None:
    assert configure(tmp_path).settings.max_request_size == 64 * 2**20
    found = configure(tmp_path, SAGEMAKER_MAX_REQUEST_SIZE="5", SAGEMAKER_MAX_PAYLOAD_IN_MB="6")
    assert found.settings.max_request_size == 5
    assert [str(warning) for warning in found.warnings] == [
        "SAGEMAKER_MAX_PAYLOAD_IN_MB is not used: SAGEMAKER_MAX_REQUEST_SIZE wins"
    ]


def test_port_wins_over_inference_address(tmp_path: Path) -> None:
    found = configure(tmp_path, "inference_address=http://10.0.0.1:1\nport=2\n")
    assert (found.settings.host, found.settings.port) == ("10.0.0.1", 2)


def test_image_fetch_timeout_aliases_must_agree(tmp_path: Path) -> None:
    assert configure(tmp_path).settings.image_fetch_timeout == 10
    same = {"APHRODITE_IMAGE_FETCH_TIMEOUT": "6", "VLLM_IMAGE_FETCH_TIMEOUT": "6.0"}
    assert configure(tmp_path, **same).settings.image_fetch_timeout == 6
    with pytest.raises(ConfigurationError, match="VLLM_IMAGE_FETCH_TIMEOUT") as raised:
        configure(tmp_path, **{**same, "VLLM_IMAGE_FETCH_TIMEOUT": "7"})
    assert "APHRODITE_IMAGE_FETCH_TIMEOUT" in str(raised.value)
