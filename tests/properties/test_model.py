"""Which model is served."""

import subprocess
import sys
from pathlib import Path

import pytest

from properties.configuration import ConfigurationError, resolve
from properties.model import ModelLocation


def directory(path: Path, file: str | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    if file is not None:
        (path / "serving.properties").write_text(file)
    return path


@pytest.mark.parametrize("variable", ["HF_MODEL_ID", "OPTION_MODEL_ID"])
def test_hub_id_with_an_empty_store(tmp_path: Path, variable: str) -> None:
    found = resolve(model=None, environ={variable: "org/My-Model.v1", "HF_REVISION": "v2"}, model_store=tmp_path)
    assert found.model_location == ModelLocation("hub", "org/My-Model.v1", "org_My_Model_v1", "v2")
    assert found.home is None
    assert found.warnings == []


def test_what_sagemakers_sdk_sends_needs_no_warning(tmp_path: Path) -> None:
    version_2 = {
        "OPTION_LIMIT_MM_PER_PROMPT": '{"image":2}',
        "HF_MODEL_ID": "llava-hf/llava-v1.6-mistral-7b-hf",
        "OPTION_ENGINE": "Python",
    }
    version_3 = {
        "HF_MODEL_ID": "org/m",
        "TENSOR_PARALLEL_DEGREE": "1",
        "OPTION_DTYPE": "bf16",
        "OPTION_ENGINE": "Python",
        "SERVING_MIN_WORKERS": "1",
        "SERVING_MAX_WORKERS": "1",
        "OPTION_MODEL_LOADING_TIMEOUT": "240",
        "OPTION_PREDICT_TIMEOUT": "60",
        "SERVING_OPTS": "-Dai.djl.logging.level=debug",
        "HF_HOME": "/opt/ml/model/",
        "SAGEMAKER_PROGRAM": "",
        "SAGEMAKER_SUBMIT_DIRECTORY": "",
        "SAGEMAKER_CONTAINER_LOG_LEVEL": "20",
    }
    for environ in (version_2, version_3):
        found = resolve(model=None, environ=environ, model_store=tmp_path)
        assert found.warnings == []
        assert found.model_location.value == environ["HF_MODEL_ID"]


def test_a_program_of_another_toolkit_is_not_run_and_said_so(tmp_path: Path) -> None:
    for program, warnings in (("model.py", 0), ("inference.py", 1)):
        environ = {
            "HF_MODEL_ID": "org/m",
            "SAGEMAKER_PROGRAM": program,
            "SAGEMAKER_SUBMIT_DIRECTORY": "/opt/ml/model/code",
        }
        found = resolve(model=None, environ=environ, model_store=tmp_path)
        assert len(found.warnings) == warnings
        assert all("SAGEMAKER_PROGRAM has no effect" in str(warning) for warning in found.warnings)


def test_hub_id_without_any_store(tmp_path: Path) -> None:
    found = resolve(model=None, environ={"HF_MODEL_ID": "org/m"}, model_store=tmp_path / "none")
    assert found.model_location.value == "org/m"


def test_store_is_the_model(tmp_path: Path) -> None:
    store = directory(tmp_path / "model", "option.dtype=fp16\n")
    found = resolve(model=None, environ={}, model_store=store)
    assert found.model_location == ModelLocation("directory", str(store), "model")
    assert found.home == store
    assert found.settings.dtype == "float16"
    assert found.settings.model_id == str(store)


def test_serving_properties_in_the_store_configure_a_hub_model(tmp_path: Path) -> None:
    (tmp_path / "serving.properties").write_text("option.dtype=bf16\n")
    found = resolve(model=None, environ={"HF_MODEL_ID": "org/m"}, model_store=tmp_path)
    assert found.model_location.kind == "hub"
    assert found.settings.dtype == "bfloat16"


def test_a_named_model_wins_over_the_one_in_the_store_with_a_warning(tmp_path: Path) -> None:
    store = directory(tmp_path / "model")
    found = resolve(model=None, environ={"HF_MODEL_ID": "org/m"}, model_store=store)
    assert found.model_location.value == "org/m"
    assert "is not served: HF_MODEL_ID names org/m" in str(found.warnings[0])


def test_hf_model_id_may_be_the_store_itself(tmp_path: Path) -> None:
    store = directory(tmp_path / "model")
    found = resolve(model=None, environ={"HF_MODEL_ID": str(store)}, model_store=store)
    assert found.model_location == ModelLocation("directory", str(store), "model")
    assert found.warnings == []


def test_hf_model_id_may_be_a_directory_with_its_own_properties(tmp_path: Path) -> None:
    model = directory(tmp_path / "mine", "option.seed=4\n")
    found = resolve(model=None, environ={"HF_MODEL_ID": str(model)}, model_store=tmp_path / "none")
    assert found.home == model
    assert found.settings.seed == 4


def test_command_line_directory_wins_over_the_environment(tmp_path: Path) -> None:
    model = directory(tmp_path / "mine")
    found = resolve(model=str(model), environ={"HF_MODEL_ID": "org/m"}, model_store=tmp_path)
    assert found.model_location.value == str(model)
    assert [str(warning) for warning in found.warnings] == ["HF_MODEL_ID is not used: MODEL names a directory"]


def test_properties_of_a_command_line_directory_may_name_the_model(tmp_path: Path) -> None:
    (tmp_path / "serving.properties").write_text("option.model_id=org/m\n")
    assert resolve(model=str(tmp_path), environ={}).model_location.value == "org/m"


def test_model_and_option_that_differ_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"option.model_id has two different values"):
        resolve(model="org/a", environ={}, options=["model_id=org/b"])


def test_relative_model_id_is_looked_for_beside_the_properties(tmp_path: Path) -> None:
    directory(tmp_path / "weights")
    (tmp_path / "serving.properties").write_text("option.model_id=weights\n")
    found = resolve(model=None, environ={}, model_store=tmp_path)
    assert found.model_location.value == str(tmp_path / "weights")


def test_s3(tmp_path: Path) -> None:
    found = resolve(model=None, environ={"HF_MODEL_ID": "s3://bucket/llava-1.5/"}, model_store=tmp_path)
    assert found.model_location == ModelLocation("s3", "s3://bucket/llava-1.5/", "llava_1_5")


def test_store_with_one_directory(tmp_path: Path) -> None:
    model = directory(tmp_path / "llava", "option.seed=4\n")
    (tmp_path / ".cache").mkdir()
    found = resolve(model=None, environ={}, model_store=tmp_path)
    assert (found.home, found.settings.seed, found.model_location.name) == (model, 4, "llava")


def test_store_with_several_directories(tmp_path: Path) -> None:
    directory(tmp_path / "a")
    directory(tmp_path / "b")
    with pytest.raises(ConfigurationError, match=r"several models \(a, b\)"):
        resolve(model=None, environ={}, model_store=tmp_path)


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no model: give MODEL, set HF_MODEL_ID"):
        resolve(model=None, environ={}, model_store=tmp_path)
    (tmp_path / "serving.properties").write_text("option.dtype=fp16\n")
    with pytest.raises(ConfigurationError, match=r"holds neither config\.json nor model\.py"):
        resolve(model=None, environ={}, model_store=tmp_path)


@pytest.mark.parametrize("model", ["/no/such/place", "./nowhere", "a/b/c", '"org/model"', "djl://x"])
def test_what_is_no_model(model: str) -> None:
    with pytest.raises(ConfigurationError, match=r"option.model_id = .*(no such directory|allowed: a directory)"):
        resolve(model=model, environ={})


def test_downloaded_s3_model_brings_its_own_properties_and_config(tmp_path: Path) -> None:
    found = resolve(model="s3://bucket/m", environ={"OPTION_SEED": "1", "OPTION_DTYPE": "fp16"})
    directory(tmp_path, "option.seed=2\noption.model_id=/elsewhere\n")
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
    later = found.with_model_directory(tmp_path)
    assert (later.settings.seed, later.settings.dtype) == (2, "float16")
    assert later.effective("max_model_len") == 512
    assert later.settings.model_id == "s3://bucket/m"
    assert later.home == tmp_path
    assert "option.model_id is not used" in str(later.warnings[0])
    assert found.settings.seed == 1


def test_hub_author_cannot_configure_the_server(tmp_path: Path) -> None:
    found = resolve(model="org/m", environ={})
    directory(tmp_path, "option.trust_remote_code=true\n")
    assert found.with_model_directory(tmp_path).settings.trust_remote_code is False


def test_reading_the_configuration_loads_no_engine() -> None:
    code = (
        "import sys; from properties.configuration import resolve; resolve(model='a/b', environ={});"
        "sys.exit(bool({'torch', 'transformers', 'handlers', 'container', 'engine'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
