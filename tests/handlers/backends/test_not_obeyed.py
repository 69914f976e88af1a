"""A setting that will not be obeyed says so, at the start and in `lmi check`."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from container.check import describe
from engine.attention.kernel import CacheShape
from engine.config import EngineConfig
from engine.machine import Device, Machine
from engine.memory import cache_blocks, encoder_budget
from handlers.backends.fit import fit
from handlers.backends.image_options import unused_by_text
from handlers.backends.rolling.plan import plan_engines, unused_devices
from handlers.backends.select import backend_of
from handlers.backends.vllm.devices import plan_devices
from handlers.errors import InvalidConfiguration
from properties.configuration import Configuration, resolve
from properties.settings import Settings
from tests.support.engine_driver import load_engine
from tests.support.models import make_llava, make_text_model, text_config
from tests.support.tiny_mllama import make_mllama

GIB = 2**30
CPU = Machine((), Device("host memory", 24 * GIB))
GPUS = Machine((Device("GPU", 24 * GIB),) * 4, CPU.host)


def configure(*options: str, model: str = "org/model", **environ: str) -> Configuration:
    return resolve(model=model, environ=environ, options=options)


def told(found: list[Any]) -> str:
    (problem,) = found
    return str(problem)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"image":16,"video":2}', "allows video, which is not served: only images are"),
        ("image=4,Video=1,audio=3", "allows video and audio, which is not served"),
        ('{"audio": {"count": 2}}', "allows audio"),
        ('{"image":1,"video":1}', "allows video, which is not served"),
        ('{"video":1}', "allows video"),
        ("audio=1", "allows audio"),
    ],
)
def test_other_modalities_are_not_served(text: str, reason: str) -> None:
    assert reason in told(configure(f"limit_mm_per_prompt={text}").warnings)


@pytest.mark.parametrize("text", ['{"image":4,"video":0}', '{"image": 4}', "image=2,video=0,audio=0"])
def test_limits_that_are_obeyed_need_no_warning(text: str) -> None:
    assert configure(f"limit_mm_per_prompt={text}").warnings == []
    assert configure('media_io_kwargs={"Image": {}}').warnings == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (['media_io_kwargs={"video": {}}'], "says how to read video, which is not served"),
        (['media_io_kwargs={"Image": {}, "Video": {}}'], "says how to read video, which is not served"),
        (["download_dir=/tmp/models"], "only models from s3:// are kept there"),
        (["handler=answer"], "option.handler (--option handler) has no effect: the model has no model.py"),
    ],
)
def test_options_that_the_model_leaves_without_effect(options: list[str], reason: str) -> None:
    assert reason in told(configure(*options).warnings)


def test_a_directory_has_no_revision(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    found = configure("revision=main", model=str(tmp_path))
    assert "only models of the hub have revisions" in told(found.warnings)
    assert configure("revision=main").warnings == []
    (tmp_path / "model.py").touch()
    assert configure("handler=answer", model=str(tmp_path)).warnings == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ["max_lora_rank=64"],
            "option.max_lora_rank (--option max_lora_rank) has no effect without",
        ),
        (["lora_dtype=bf16"], "without option.enable_lora=true"),
        (
            ["enable_stateful_sessions=false", "sessions_expiration=5"],
            "without option.enable_stateful_sessions=true",
        ),
        (["encoder_cache_mb=5"], "has no effect with the vllm backend; honoured by: rolling"),
    ],
)
def test_options_that_another_one_leaves_without_effect(options: list[str], reason: str) -> None:
    assert reason in told(configure(*options).without_effect("vllm"))


def test_one_request_at_a_time_needs_no_batch_size() -> None:
    found = configure("rolling_batch=disable", "max_rolling_batch_size=8").without_effect("rolling")
    assert "beside option.rolling_batch=disable, which serves one request at a time" in told(found)
    assert configure("rolling_batch=disable").without_effect("rolling") == []


def test_8_bits_are_for_a_cpu_and_said_to_change_answers() -> None:
    (engine,) = plan_engines(Settings(quantize="int8"), "", 0)
    assert engine.int8
    assert not plan_engines(Settings(), "", 0)[0].int8
    with pytest.raises(InvalidConfiguration, match="is int8, which the embedded engine has on a CPU only"):
        plan_engines(Settings(quantize="int8"), "", 1)
    (warning,) = configure("quantize=fp8").without_effect("rolling")
    assert "option.quantize" in str(warning)
    assert configure("quantize=INT8").without_effect("rolling") == []


def test_cuda_graphs_are_left_out_where_asked() -> None:
    assert [plan_engines(Settings(enforce_eager=off), "", 1)[0].enforce_eager for off in (True, False)] == [
        True,
        False,
    ]
    assert configure("enforce_eager=true").without_effect("rolling") == []


def unused(accelerators: int, **settings: Any) -> list[str]:
    chosen = Settings(**settings)
    found = unused_devices(chosen, plan_engines(chosen, "", accelerators), accelerators)
    theirs = plan_devices(chosen, {}, accelerators).warnings
    if accelerators:
        assert list(map(str, theirs)) == list(map(str, found)), "both backends say the same"
    return list(map(str, found))


@pytest.mark.parametrize(
    ("accelerators", "settings", "reason"),
    [
        (
            0,
            {"gpu_memory_utilization": 0.5},
            "option.gpu_memory_utilization = 0.5 has no effect: no accelerator",
        ),
        (0, {"enforce_eager": True}, "option.enforce_eager = True has no effect: no accelerator is visible"),
        (0, {"load_on_devices": [0]}, "load_on_devices = [0] has no effect: no accelerator is visible"),
        (4, {"min_workers": 2}, "min_workers = 2 has no effect: on accelerators max_workers counts"),
        (2, {"max_workers": 8, "tensor_parallel_degree": 1}, "max_workers = 8: only 2 are started"),
        (3, {"tensor_parallel_degree": 2}, "1 of 3 devices are not used"),
    ],
)
def test_options_that_the_machine_leaves_without_effect(
    accelerators: int, settings: dict[str, Any], reason: str
) -> None:
    assert reason in told(unused(accelerators, **settings))


@pytest.mark.parametrize(
    ("accelerators", "settings"),
    [
        (0, {"max_workers": 2}),
        (0, {"min_workers": 2}),
        (4, {"max_workers": 2, "min_workers": 1, "tensor_parallel_degree": 1}),
        (4, {"gpu_memory_utilization": 0.5, "load_on_devices": [0, 1]}),
    ],
)
def test_options_about_devices_that_are_obeyed(accelerators: int, settings: dict[str, Any]) -> None:
    assert unused(accelerators, **settings) == []


def test_devices_that_are_not_there_are_told_by_both_backends() -> None:
    settings = Settings(load_on_devices=[1, 4, 5])
    wrong = [f"load_on_devices names {number}, but the devices are 0 to 3" for number in (4, 5)]
    with pytest.raises(InvalidConfiguration) as refused:
        plan_engines(settings, "", 4)
    assert refused.value.message == "; ".join(wrong)
    theirs = plan_devices(settings, {}, 4)
    assert [str(problem) for problem in theirs.problems] == wrong
    assert {problem.option for problem in theirs.problems} == {"load_on_devices"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_llava(tmp_path)


def test_a_cache_larger_than_a_full_batch_can_use(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    configuration = resolve(model=str(model), environ={}, options=["kv_cache_memory_mb=90000"])
    configuration = configuration.with_model_config(config)
    found = fit(configuration, backend_of("rolling"), model, config, CPU)
    assert "option.kv_cache_memory_mb = 90000 (--option kv_cache_memory_mb): about" in told(found.warnings)
    assert "which 256 requests of 512 tokens fill" in str(found.warnings[0])
    assert found.errors == []
    theirs = fit(configuration, backend_of("vllm"), model, config, CPU)
    assert "does not fit: 87.89 GiB are needed and 24.00 GiB are usable" in told(theirs.errors)


@pytest.mark.parametrize("options", [["encoder_cache_mb=900000"], ["encoder_cache_mb=13000", "max_workers=2"]])
def test_an_encoder_cache_larger_than_the_memory(model: Path, options: list[str]) -> None:
    config = json.loads((model / "config.json").read_text())
    configuration = resolve(model=str(model), environ={}, options=options).with_model_config(config)
    found = fit(configuration, backend_of("rolling"), model, config, CPU)
    assert "is more than the 24.00 GiB of host memory" in told(found.warnings)
    smaller = resolve(model=str(model), environ={}, options=["encoder_cache_mb=500"]).with_model_config(config)
    assert fit(smaller, backend_of("rolling"), model, config, CPU).warnings == []
    assert fit(configuration, backend_of("vllm"), model, config, CPU).warnings == [], "it has no such cache"


def test_the_engine_says_so_too(caplog: pytest.LogCaptureFixture) -> None:
    shape = CacheShape(2, 1, 16, 2, 16, torch.float32, torch.device("cpu"))
    config = EngineConfig(model_path="", kv_cache_bytes=90000 << 20, max_num_seqs=2)
    with caplog.at_level(logging.WARNING):
        cache_blocks(config, shape, text_config())
    assert "of the 90000 MiB of kv_cache_memory_mb: 2 requests of 512 tokens fill no more" in caplog.text


def test_the_engine_says_that_an_encoder_cache_is_too_large(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        encoder_budget(EngineConfig(model_path="", encoder_cache_bytes=500 << 20), torch.device("cpu"), 0)
        assert caplog.text == ""
        encoder_budget(EngineConfig(model_path="", encoder_cache_bytes=900_000_000 << 20), torch.device("cpu"), 0)
    assert "encoder_cache_mb = 900000000 is more than the memory of" in caplog.text


@pytest.mark.parametrize(("machine", "less"), [(GPUS, 100 << 20), (CPU, 0)], ids=["GPU", "CPU"])
def test_an_encoder_cache_that_was_asked_for_comes_out_of_an_accelerators_memory(
    model: Path, machine: Machine, less: int
) -> None:
    config = json.loads((model / "config.json").read_text())

    def room(*options: str) -> int:
        many = ("max_rolling_batch_size=1000000", *options)
        configuration = resolve(model=str(model), environ={}, options=many).with_model_config(config)
        found = fit(configuration, backend_of("rolling"), model, config, machine)
        assert found.cache_per_device is not None
        return found.cache_per_device

    assert room() - room("encoder_cache_mb=100") == less


def test_an_encoder_cache_smaller_than_an_image_that_a_request_keeps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_mllama(tmp_path / "mllama")
    config = json.loads((model / "config.json").read_text())
    for asked, expected in ((0, True), (1, False)):
        options = [f"encoder_cache_mb={asked}"]
        configuration = resolve(model=str(model), environ={}, options=options).with_model_config(config)
        warned = " ".join(map(str, fit(configuration, backend_of("rolling"), model, config, CPU).warnings))
        assert ("encoder_cache_mb = 0 (--option encoder_cache_mb) is less than the 1 MiB" in warned) == expected
    with caplog.at_level(logging.INFO):
        engine = load_engine(model, encoder_cache_bytes=0)
    assert "encoder_cache_mb = 0 is less than the 1 MiB that one image of a running request takes" in caplog.text
    assert "memory for 1 images of running requests, 0.0 MiB each" in caplog.text
    assert engine.scheduler.image_slots == 1


def test_a_text_model_has_no_use_for_options_about_images(tmp_path: Path) -> None:
    configuration = resolve(
        model=str(make_text_model(tmp_path)),
        environ={"OPTION_DTYPE": "fp32", "OPTION_LIMIT_MM_PER_PROMPT": '{"image": 4}'},
        options=["rolling_batch=rolling", "image_processor_backend=pil"],
    )
    assert describe(configuration, CPU)["warnings"] == [
        "option.limit_mm_per_prompt has no effect: the model takes no images",
        "option.image_processor_backend has no effect: the model takes no images",
    ]
    nothing = Settings(limit_mm_per_prompt={"image": 0, "video": 0, "audio": 0}, encoder_cache_mb=None)
    assert unused_by_text(nothing) == []


def test_check_prints_what_the_machine_leaves_without_effect(model: Path) -> None:
    configuration = resolve(
        model=str(model),
        environ={},
        options=["gpu_memory_utilization=0.5", 'limit_mm_per_prompt={"video":2}'],
    )
    warnings = describe(configuration, CPU)["warnings"]
    assert len(warnings) == 2
    assert "allows video" in warnings[0]
    assert "no accelerator is visible" in warnings[1]
