"""SageMaker's secure mode: each control forbids what it names, by file or option, and a start is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from properties.configuration import Configuration, ConfigurationError, resolve
from tests.support.shapes import SHAPES

ALL = (
    "DISALLOW_REQUIREMENTS_TXT, DISALLOW_PICKLE_FILES,DISALLOW_TRUST_REMOTE_CODE,DISALLOW_CUSTOM_INFERENCE_SCRIPTS,"
    "DISALLOW_CHAT_TEMPLATE"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    (path / "tokenizer_config.json").write_text("{}")
    return path


def secured(model: Path | str, *options: str, controls: str = ALL, **environ: str) -> Configuration:
    variables = {"SAGEMAKER_SECURE_MODE": "True", "SAGEMAKER_SECURITY_CONTROLS": controls, **environ}
    return resolve(
        model=str(model),
        environ=variables,
        options=options,
        backend_options=frozenset({"worker_cls", "compilation_config", "hf_overrides"}),
    )


def forbidden(model: Path | str, *options: str, controls: str = ALL, **environ: str) -> str:
    with pytest.raises(ConfigurationError) as raised:
        secured(model, *options, controls=controls, **environ)
    (problem,) = raised.value.problems
    return str(problem)


@pytest.mark.parametrize(
    ("name", "content", "control"),
    [
        ("requirements.txt", "x", "DISALLOW_REQUIREMENTS_TXT"),
        ("code/requirements.txt", "x", "DISALLOW_REQUIREMENTS_TXT"),
        ("deep/down/requirements.txt", "x", "DISALLOW_REQUIREMENTS_TXT"),
        ("model.py", "", "DISALLOW_CUSTOM_INFERENCE_SCRIPTS"),
        ("code/model.py", "", "DISALLOW_CUSTOM_INFERENCE_SCRIPTS"),
        ("pytorch_model.bin", "", "DISALLOW_PICKLE_FILES"),
        ("deep/down/weights.PTH", "", "DISALLOW_PICKLE_FILES"),
        ("adapters/a/adapter_model.bin", "", "DISALLOW_PICKLE_FILES"),
        ("tokenizer_config.json", '{"chat_template": "x"}', "DISALLOW_CHAT_TEMPLATE"),
        ("tokenizer_config.json", "{not json", "DISALLOW_CHAT_TEMPLATE"),
        ("processor_config.json", '{"chat_template": "x"}', "DISALLOW_CHAT_TEMPLATE"),
        ("chat_template.json", "{}", "DISALLOW_CHAT_TEMPLATE"),
        ("chat_template.jinja", "", "DISALLOW_CHAT_TEMPLATE"),
        ("additional_chat_templates/tool_use.jinja", "", "DISALLOW_CHAT_TEMPLATE"),
    ],
)
def test_a_forbidden_file_is_named_with_its_control(model: Path, name: str, content: str, control: str) -> None:
    path = model / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    assert forbidden(model) == f"{path} is forbidden by {control} of SAGEMAKER_SECURITY_CONTROLS: remove it"
    others = ",".join(other for other in ALL.replace(" ", "").split(",") if other != control)
    secured(model, controls=others)


@pytest.mark.parametrize(
    ("option", "control"),
    [
        ("trust_remote_code=true", "DISALLOW_TRUST_REMOTE_CODE"),
        ("install_requirements=true", "DISALLOW_REQUIREMENTS_TXT"),
        ("load_format=pt", "DISALLOW_PICKLE_FILES"),
        ("chat_template={{ messages }}", "DISALLOW_CHAT_TEMPLATE"),
        ("trust_request_chat_template=true", "DISALLOW_CHAT_TEMPLATE"),
    ],
)
def test_a_forbidden_option_is_named_with_its_control(model: Path, option: str, control: str) -> None:
    name = option.partition("=")[0]
    assert f"{name} (--option {name}) is forbidden by {control}" in forbidden(model, option)
    others = ",".join(other for other in ALL.replace(" ", "").split(",") if other != control)
    secured(model, option, controls=others)


def test_code_of_the_models_own_under_another_name(model: Path) -> None:
    (model / "mine.py").write_text("")
    assert "entry_point (DJL_ENTRY_POINT) is forbidden by DISALLOW_CUSTOM" in forbidden(
        model, DJL_ENTRY_POINT="mine.py"
    )
    secured(model, "entryPoint=djl_python.huggingface")


@pytest.mark.parametrize("place", ["model/mine", "channel"])
def test_requirements_beside_an_entry_point_elsewhere(model: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "channel").mkdir()
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    (folder / "handler.py").write_text("")
    (folder / "requirements.txt").write_text("x")
    told = forbidden(
        model,
        f"entryPoint={folder}/handler.py",
        controls="DISALLOW_REQUIREMENTS_TXT",
        SAGEMAKER_UNTRUSTED_CHANNELS=f"{tmp_path}/channel",
    )
    assert told.startswith(f"{folder}/requirements.txt is forbidden by DISALLOW_REQUIREMENTS_TXT")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("worker_cls", "mine.Worker"),
        ("compilation_config", '{"backend": "mine.compile"}'),
        ("hf_overrides", '{"architectures": ["Mine"]}'),
    ],
)
def test_options_that_only_vllm_knows_are_forbidden(model: Path, name: str, value: str) -> None:
    variable = f"OPTION_{name.upper()}"
    assert f"option.{name} ({variable}) is forbidden" in forbidden(model, **{variable: value})


@pytest.mark.parametrize(
    "option",
    [
        'speculative_config={"method": "eagle", "model": "org/draft", "num_speculative_tokens": 2}',
        'speculative_config={"method": "custom_class", "model": "mine.Proposer", "num_speculative_tokens": 2}',
        'speculative_config={"method": "ngram", "draft_load_config": {"load_format": "pt"}}',
        'kv_transfer_config={"kv_connector_module_path": "x.y"}',
        'kv_transfer_config={"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": []}}',
    ],
)
def test_what_can_bring_code_or_files_past_the_controls_is_forbidden_by_each(model: Path, option: str) -> None:
    name = option.partition("=")[0]
    told = forbidden(model, option, controls="DISALLOW_PICKLE_FILES")
    assert told == f"{name} (--option {name}) is forbidden by SAGEMAKER_SECURE_MODE"


def test_the_options_that_vision_models_need_are_allowed(model: Path) -> None:
    options = (
        'limit_mm_per_prompt={"image": 4}',
        "tool_call_parser=hermes",
        "max_model_len=4096",
        "async_mode=true",
        'speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}',
    )
    assert secured(model, *options).settings.limit_mm_per_prompt["image"] == 4


def test_untrusted_channels_are_searched(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
    (tmp_path / "b" / "sub" / "x.pkl").write_bytes(b"")
    (tmp_path / "b" / "model.py").write_text("")  # not the model's: nothing runs it
    channels = f"{tmp_path / 'a'}, {tmp_path / 'b'}"
    told = forbidden(model, SAGEMAKER_UNTRUSTED_CHANNELS=channels)
    assert told.startswith(f"{tmp_path}/b/sub/x.pkl is forbidden by DISALLOW_PICKLE_FILES")
    assert "nowhere is not a directory" in forbidden(model, SAGEMAKER_UNTRUSTED_CHANNELS=f"{tmp_path}/nowhere")


def test_a_model_that_is_fetched_is_checked_when_it_is_there(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"")
    configuration = secured("org/model")
    with pytest.raises(ConfigurationError, match=r"pytorch_model\.bin is forbidden by DISALLOW_PICKLE_FILES"):
        configuration.with_model_directory(model)


def test_the_variables_themselves(model: Path) -> None:
    assert "needs SAGEMAKER_SECURITY_CONTROLS; allowed: DISALLOW_" in forbidden(model, controls=" ")
    assert "'DISALLOW_PICKLES' is not known" in forbidden(model, controls=ALL + ",DISALLOW_PICKLES")
    (model / "model.py").write_text("")
    assert resolve(model=str(model), environ={"SAGEMAKER_SECURE_MODE": "false"}).warnings == []


def test_a_start_is_refused_with_the_documented_status(tmp_path: Path) -> None:
    shutil.copytree(SHAPES, tmp_path / "m", ignore=shutil.ignore_patterns("*.py", "pictures"))
    (tmp_path / "m" / "optimizer.pt").write_bytes(b"")
    variables = {"SAGEMAKER_SECURE_MODE": "true", "SAGEMAKER_SECURITY_CONTROLS": "DISALLOW_PICKLE_FILES"}

    def lmi(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "container.cli", *command],
            capture_output=True,
            text=True,
            env=variables,
        )

    done = lmi("serve", str(tmp_path / "m"), "--port", "0")
    assert done.returncode == 1
    assert "optimizer.pt is forbidden by DISALLOW_PICKLE_FILES" in done.stderr
    assert "Traceback" not in done.stderr
    report = json.loads(lmi("check", str(tmp_path / "m"), "--json").stdout)
    assert "optimizer.pt is forbidden" in report["errors"][0]
