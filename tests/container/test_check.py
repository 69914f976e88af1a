"""`lmi check`: what would be served, without loading it."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import CLIPImageProcessor

from container.check import check, describe, run_check
from container.cli import main
from engine.families.registry import served
from engine.machine import Device, Machine, host_memory
from engine.memory import CUDA_RESERVE, GRAPHS_RESERVE
from handlers.artefacts import ArtefactError
from handlers.artefacts.fetch import fetch
from handlers.backends.estimate import cache_bytes_per_token, weights
from handlers.backends.fit import fit
from handlers.backends.instances import instance_of
from handlers.backends.select import backend_of
from handlers.version import VERSION
from properties.configuration import resolve
from tests.support import instance_table
from tests.support.checked import CPU, GIB, report
from tests.support.models import make_tokenizer
from tests.support.tiny_qwen_vl import make_qwen_vl

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "dtype": "bfloat16",
    "image_token_index": 259,
    "text_config": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 100,
        "max_position_embeddings": 256,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    },
}
LARGE = 7_063_427_072
"""Parameters of LLaVA-1.5-7B."""
TOKEN = 2 * 3 * 2 * 16 * 2
"""Keys and values x layers x heads x head size x bytes of bfloat16."""


def machine(count: int, memory: int = 24 * GIB) -> Machine:
    return Machine((Device("GPU", memory),) * count, CPU.host)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {"a": np.zeros((100, 64), np.float32), "b": np.zeros(7, np.int64)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    make_tokenizer().save_pretrained(tmp_path)
    CLIPImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    return tmp_path


def test_weights_are_counted_from_headers_in_the_served_type(model: Path) -> None:
    assert report(model, CPU)["memory"]["weights"] == 6400 * 2 + 7 * 8
    assert report(model, CPU, "dtype=fp32")["memory"]["weights"] == 6400 * 4 + 7 * 8


def test_weights_of_several_files_are_counted_once(model: Path) -> None:
    save_file({"c": np.zeros(10, np.float16)}, model / "model-2.safetensors")
    save_file({"a": np.zeros((100, 64), np.float16)}, model / "consolidated.safetensors")
    assert report(model, CPU)["memory"]["weights"] == 6400 * 2 + 7 * 8 + 20
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert report(model, CPU)["memory"]["weights"] == 6400 * 2 + 7 * 8


def test_weights_from_an_index_and_from_shapes(tmp_path: Path) -> None:
    shapes = weights(tmp_path, CONFIG, "bfloat16")
    assert shapes is not None
    text = 2 * 100 * 64 + 3 * (2 * 64 * 16 * (4 + 2) + 3 * 64 * 128)
    vision = 2 * (2 * 32 * 16 * (2 + 2) + 2 * 32 * 64)
    assert (shapes.size, shapes.basis) == ((text + vision) * 2, "shapes in config.json")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1000}, "weight_map": {"a": "absent.safetensors"}})
    )
    index = weights(tmp_path, CONFIG, "float32")
    assert index is not None
    assert (index.size, index.basis) == (2000, "total_size in model.safetensors.index.json")
    assert weights(tmp_path / "none", {}, "float32") is None


def test_cache_per_token() -> None:
    assert cache_bytes_per_token(CONFIG, "bfloat16") == TOKEN
    plain = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    assert cache_bytes_per_token(plain, "float32") == 2 * 2 * 4 * 8 * 4
    assert cache_bytes_per_token({}, "float32") is None


def test_shapes_that_config_json_leaves_to_the_family_are_filled_in(model: Path) -> None:
    short = {**CONFIG, "text_config": {"model_type": "llama", "max_position_embeddings": 256}}
    (model / "config.json").write_text(json.dumps(short))
    assert report(model, CPU)["memory"]["cache_bytes_per_token"] == 2 * 32 * 32 * 128 * 2


def test_cache_on_the_host(model: Path) -> None:
    full_batch = report(model, CPU, "max_rolling_batch_size=4")["memory"]
    assert full_batch["cache_per_device"] == 4 * 256 * TOKEN
    assert full_batch["cache_tokens"] == 4 * 256
    small = Machine((), Device("host memory", 4 * 2**20))
    assert report(model, small)["memory"]["cache_per_device"] == 2**20
    asked = report(model, CPU, "kv_cache_memory_mb=1")["memory"]
    assert asked["cache_per_device"] == 2**20


def test_devices_share_weights_and_cache(model: Path) -> None:
    memory = report(model, machine(4), "tensor_parallel_degree=2")["memory"]
    assert (memory["copies"], memory["devices_per_copy"]) == (2, 2)
    assert memory["weights_per_device"] == (6400 * 2 + 7 * 8) // 2
    everything = report(model, machine(4))["memory"]
    assert (everything["copies"], everything["devices_per_copy"]) == (1, 4)


def test_more_devices_than_there_are(model: Path) -> None:
    (error,) = report(model, machine(2), "tensor_parallel_degree=4")["errors"]
    assert "tensor_parallel_degree is 4, but 2 devices are there" in error
    assert report(model, CPU, "tensor_parallel_degree=2")["errors"] == []


@pytest.mark.parametrize(
    ("options", "replicas", "devices"),
    [
        ([], 1, 4),
        (["tensor_parallel_degree=2"], 2, 2),
        (["pipeline_parallel_degree=2"], 1, 4),
        (["pipeline_parallel_degree=2", "tensor_parallel_degree=1", "max_workers=1"], 1, 2),
    ],
)
def test_vllm_multiplies_both_degrees(model: Path, options: list[str], replicas: int, devices: int) -> None:
    found = fit(resolve(model=str(model), environ={}, options=options), backend_of("vllm"), model, CONFIG, machine(4))
    assert (found.replicas, found.devices_per_replica) == (replicas, devices)


def test_vllm_with_too_few_devices(model: Path) -> None:
    options = ["pipeline_parallel_degree=2", "tensor_parallel_degree=4"]
    found = fit(resolve(model=str(model), environ={}, options=options), backend_of("vllm"), model, CONFIG, machine(4))
    assert "needs 8 devices, but 4 are there" in str(found.errors[0])


def test_the_template_and_the_tokens_of_images_are_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(model, CPU)["prompts"] == {
        "template": "chat_template.jinja",
        "image_tokens": {"336x336": 16, "1344x1344": 16, "1920x1080": 16},
    }
    assert main(["check", str(model)]) == 0
    out = capsys.readouterr().out
    assert "chat template: chat_template.jinja\n" in out
    assert "tokens of an image: 336x336: 16, 1344x1344: 16, 1920x1080: 16\n" in out


def test_images_that_fill_the_context_are_told(model: Path) -> None:
    assert report(model, CPU, 'limit_mm_per_prompt={"image": 15}')["warnings"] == []
    (warning,) = report(model, CPU, 'limit_mm_per_prompt={"image": 16}')["warnings"]
    assert warning.startswith("16 images (option.limit_mm_per_prompt) take 256 tokens, and the ")
    assert "context holds 256: such requests are refused" in warning
    (warning,) = report(model, CPU, 'limit_mm_per_prompt={"image": 9}', "max_model_len=16")["warnings"]
    assert warning.startswith("an image takes 16 tokens")


def test_the_largest_images_that_the_limits_allow_are_the_ones_considered(tmp_path: Path) -> None:
    """A model with a token for every 28 x 28 pixels, and at most 400."""
    model = make_qwen_vl(tmp_path / "qwen", most_tokens=400)
    (warning,) = report(model, CPU, "max_model_len=200")["warnings"]
    numbers = re.match(
        r"an image of (\d+)x(\d+) pixels takes (\d+) tokens \(of (\d+)x(\d+), which option\.max_image_pixels", warning
    )
    assert numbers is not None, warning
    width, height, tokens, widest, tallest = map(int, numbers.groups())
    assert 200 <= tokens <= width * height / 28**2 * 1.2
    assert widest * tallest > width * height
    assert report(model, CPU, "max_model_len=200", "max_image_pixels=100000")["warnings"] == []


def test_a_model_that_does_not_fit(model: Path) -> None:
    (error,) = report(model, machine(1, 10_000))["errors"]
    assert "does not fit" in error
    (error,) = report(model, CPU, "kv_cache_memory_mb=9000", "max_rolling_batch_size=100000000")["errors"]
    assert "usable on the host" in error


@pytest.fixture
def large(model: Path) -> Path:
    """A model of the size of LLaVA-1.5-7B: its shapes, and a file of weights that has only a header."""
    text = {**CONFIG["text_config"], "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32064}
    config = {**CONFIG, "text_config": {**text, "max_position_embeddings": 4096}}
    (model / "config.json").write_text(json.dumps(config))
    size = 2 * LARGE
    header = json.dumps({"a": {"dtype": "BF16", "shape": [LARGE], "data_offsets": [0, size]}}).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    return model


def on_instance(model: Path, name: str, *options: str) -> dict[str, Any]:
    configuration = resolve(model=str(model), environ={}, options=["rolling_batch=rolling", *options])
    return describe(configuration, instance_of(name).machine)


def test_a_model_of_7b_fits_an_instance_that_has_the_memory(large: Path) -> None:
    found = on_instance(large, "ml.g6.12xlarge")
    memory = found["memory"]
    assert found["errors"] == []
    assert (memory["device"], memory["copies"], memory["devices_per_copy"]) == ("NVIDIA L4", 1, 4)
    assert (memory["devices"], memory["weights_per_device"]) == (4, 2 * LARGE // 4)
    usable = int((22888 << 20) * 0.9)
    assert memory["cache_per_device"] == usable - 2 * LARGE // 4 - CUDA_RESERVE
    assert memory["cache_tokens"] == memory["cache_per_device"] * 4 // (2 * 32 * 32 * 128 * 2)
    copies = on_instance(large, "g6.12xlarge", "tensor_parallel_degree=1")["memory"]
    assert (copies["copies"], copies["devices_per_copy"]) == (4, 1)
    assert copies["cache_per_device"] == usable - 2 * LARGE - CUDA_RESERVE - GRAPHS_RESERVE
    eager = on_instance(large, "g6.12xlarge", "tensor_parallel_degree=1", "enforce_eager=true")["memory"]
    assert eager["cache_per_device"] == copies["cache_per_device"] + GRAPHS_RESERVE


def test_a_model_that_leaves_an_instance_no_cache_needs_several_devices(large: Path) -> None:
    (error,) = on_instance(large, "g4dn.xlarge")["errors"]
    assert error.startswith("the model does not fit: its weights leave 0 tokens of key/value cache on g4dn.xlarge")
    memory = on_instance(large, "g4dn.12xlarge")["memory"]
    assert (memory["devices_per_copy"], memory["dtype"]) == (4, "float16")
    assert memory["cache_tokens"] > 4096


def test_a_model_that_does_not_fit_an_instance(large: Path) -> None:
    (error,) = on_instance(large, "g5.xlarge", "dtype=fp32")["errors"]
    assert error.startswith(
        "the model does not fit: 26.31 GiB are needed and 20.12 GiB are usable on each device of g5.x"
    )
    (error,) = on_instance(large, "g6.12xlarge", "tensor_parallel_degree=8")["errors"]
    assert "tensor_parallel_degree is 8, but 4 devices are there" in error


def test_an_instance_is_named_in_what_is_printed(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--instance", "ml.g6.12xlarge", str(large), "--rolling-batch=rolling"]) == 0
    text = capsys.readouterr().out
    assert "\ninstance g6.12xlarge: 4 x NVIDIA L4, 22.35 GiB each, 48 vCPUs, 192.00 GiB of host memory\n" in text
    assert "devices needed: 4, there: 4 on g6.12xlarge\n" in text
    assert main(["check", str(large), "--instance=c7i.4xlarge", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["instance"]["name"], found["instance"]["gpu"]) == ("c7i.4xlarge", None)
    assert found["memory"]["device_memory"] == 32 * GIB


def test_instances_are_compared(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = [instance_of(name) for name in ("g4dn.xlarge", "g6.xlarge", "g6.2xlarge", "g6.12xlarge")]
    options = ["rolling_batch=rolling", "tensor_parallel_degree=1"]
    assert run_check(str(large), options, False, {}, instances=some) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "no errors, no warnings: this fits 3 of 4 instances"
    rows = [line.split("  ")[0] for line in lines if " x " in line]
    assert rows == ["g4dn.xlarge", "g6.xlarge, 2xlarge", "g6.12xlarge"]
    assert run_check(str(large), options, True, {}, instances=some) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["fits"], row["copies"]) for row in found["instances"]] == [(False, 1), (True, 1), (True, 1), (True, 4)]
    assert run_check(str(large), [*options, "dtype=fp32"], False, {}, instances=some[:3]) == 1
    assert "this fits 0 of 3" in capsys.readouterr().out


def test_the_page_has_the_tables_that_the_check_computes() -> None:
    page = instance_table.PAGE.read_text("utf-8")
    assert page == instance_table.rewritten(page), "run make docs"


def test_an_unknown_instance_is_named_with_those_that_are_near(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", str(large), "--instance", "ml.g6.13xlarge"])
    assert ended.value.code == 2
    assert "unknown instance 'ml.g6.13xlarge': did you mean " in (error := capsys.readouterr().err)
    assert "g6.12xlarge" in error


def test_a_cache_that_holds_no_full_request(model: Path) -> None:
    tiny = Machine((), Device("host memory", 128 * 1024))
    (warning,) = report(model, tiny)["warnings"]
    assert "holds 85 tokens" in warning
    assert "will be lowered" in warning
    (error,) = report(model, tiny, "max_model_len=200")["errors"]
    assert "lower it or enlarge the cache" in error


def test_more_tokens_than_the_model_has_positions(model: Path) -> None:
    (error,) = report(model, CPU, "max_model_len=257")["errors"]
    assert "option.max_model_len = 257 (--option max_model_len) is more than the 256 positions" in error
    assert report(model, CPU, "max_model_len=256")["errors"] == []


def test_replicas_share_the_host(model: Path) -> None:
    small = Machine((), Device("host memory", 8 * 2**20))
    memory = report(model, small, "max_workers=2")["memory"]
    assert (memory["copies"], memory["cache_per_device"]) == (2, 2**20)


def test_a_damaged_checkpoint_is_named(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    (error,) = report(model, CPU)["errors"]
    assert "model.safetensors is not a safetensors file" in error


def test_backend_and_its_reason(model: Path) -> None:
    assert report(model, CPU)["backend"]["backend"] == "rolling"
    (warning,) = report(model, CPU, "max_loras=2")["warnings"]
    assert "option.max_loras (--option max_loras) has no effect with the rolling backend" in warning


def test_hub_models_are_unknown_until_downloaded() -> None:
    found = describe(resolve(model="org/m", environ={}), CPU)
    assert found["memory"] is None
    assert found["model"]["kind"] == "hub"
    assert found["errors"] == []


@pytest.fixture
def cached(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model as org/m in the hub's cache; the hub is not asked."""
    cache = tmp_path / "cache"
    place = cache / "models--org--m"
    snapshot = place / "snapshots" / ("a" * 40)
    shutil.copytree(model, snapshot, ignore=shutil.ignore_patterns("cache"))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return snapshot


def test_a_model_in_the_hubs_cache_is_what_an_offline_start_serves(cached: Path) -> None:
    configuration = resolve(model="org/m", environ={"OPTION_ROLLING_BATCH": "rolling"}, options=["offline=true"])
    found = describe(configuration, CPU)
    assert found["errors"] == []
    assert found["model"]["served_as"] == ["org/m"]
    assert found["model"]["directory"] == str(cached)
    assert found["options"]["option.max_model_len"]["value"] == 256
    assert found["memory"]["weights"] == 6400 * 2 + 7 * 8
    assert fetch(configuration.model_location, configuration.settings, threading.Event()) == cached


def test_what_an_offline_start_will_not_find_is_an_error(cached: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check("org/other", ["offline=true"], False, {}) == 1
    assert "error: org/other is not in " in capsys.readouterr().out
    configuration = resolve(model="org/other", environ={}, options=["offline=true"])
    with pytest.raises(ArtefactError, match="org/other is not in "):
        fetch(configuration.model_location, configuration.settings, threading.Event())
    (cached / "tokenizer.json").unlink()
    (error,) = describe(resolve(model="org/m", environ={"TRANSFORMERS_OFFLINE": "1"}), CPU)["errors"]
    assert "the model has no tokenizer" in error


def test_what_a_copy_in_the_cache_lacks_is_fetched_by_the_start(cached: Path) -> None:
    (cached / "model.safetensors").unlink()
    found = describe(resolve(model="org/m", environ={}), CPU)
    assert found["errors"] == []
    assert found["warnings"][0].startswith(
        "the copy in the cache, which the start brings up to date: the model's directory holds no weights"
    )


def test_the_verdict_and_the_problems_come_first(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "model.safetensors").unlink()
    assert run_check(str(model), ["max_loras=2", "rolling_batch=rolling"], False, {}) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 error, 1 warning: this cannot be served"
    assert lines[1].startswith("error: the model's directory holds no weights")
    assert lines[2].startswith("warning: option.max_loras")
    rows = [line.split()[0] for line in lines[lines.index("") :] if line]
    assert "option.max_loras" in rows
    assert "option.seed" not in rows


@pytest.mark.parametrize("environ", [{}, {"NO_COLOR": "1"}])
def test_a_terminal_of_80_columns_shows_it_without_broken_words(model: Path, environ: dict[str, str]) -> None:
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "container.cli", "check", str(model), "--option", "max_model_len=257"]
    done = subprocess.run(
        [*command, "--option", "foo=1"],
        stdout=terminal,
        env={**os.environ, "COLUMNS": "80", "TERM": "xterm", **environ},
        check=False,
    )
    os.close(terminal)
    shown = b""
    with suppress(OSError):  # the end of what was written
        while piece := os.read(controller, 65536):
            shown += piece
    os.close(controller)
    text = shown.decode().replace("\r\n", "\n")
    assert done.returncode == 1
    assert ("\x1b[1;31merror:" in text) is (not environ)
    assert ("\x1b" in text) is (not environ)
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
    assert lines[0] == "1 error, 1 warning: this cannot be served"
    assert lines[1].startswith("error: option.max_model_len = 257")
    assert lines[2].startswith("       ")
    assert not [line for line in lines if len(line) > 80 and str(model) not in line]


def test_all_options_are_shown_when_asked_for(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(model), "--all"]) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["option.seed"] == ["0", "default"]
    assert rows["host"] == ["127.0.0.1", "default"]
    assert {tuple(rows[name][:1]) for name in ("api_key", "option.quantize", "cors_allowed_origin")} == {("-",)}
    assert "[]" not in text
    assert "--all" not in text


def test_the_address_is_the_one_that_is_bound(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_check(str(model), [], False, {})
    assert "address  127.0.0.1:8080\n" in capsys.readouterr().out
    run_check(str(model), [], False, {"SERVING_HOST": "127.0.0.2", "SERVING_PORT": "81"})
    assert "address  127.0.0.2:81\n" in capsys.readouterr().out


@pytest.fixture
def nobody() -> Iterator[None]:
    """Not root, who may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize("of_model", [True, False])
def test_what_cannot_be_read_is_told_in_one_line(capsys: pytest.CaptureFixture[str], of_model: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        closed = Path(folder) / "config.json" if of_model else Path(folder)
        (Path(folder) / "config.json").write_text("{}")
        closed.chmod(0)
        assert run_check(folder, [], False, {}) == 1
        Path(folder).chmod(0o700)
    error = capsys.readouterr().out.splitlines()[1]
    assert error.startswith("error: ")
    assert "Permission denied" in error


def test_heads_that_devices_cannot_share_are_told(model: Path) -> None:
    (error,) = report(model, CPU, "tensor_parallel_degree=3")["errors"]
    assert "tensor_parallel_degree 3 does not divide the model's num_attention_heads 4" in error


def test_a_cache_is_counted_in_whole_blocks(model: Path) -> None:
    tokens = 2**20 // TOKEN
    assert tokens % 16 != 0, "the last block is not whole"
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = tokens
    (model / "config.json").write_text(json.dumps(config))
    (error,) = report(model, CPU, "kv_cache_memory_mb=1", f"max_model_len={tokens}")["errors"]
    assert f"holds {tokens} tokens" in error
    assert report(model, CPU, "kv_cache_memory_mb=1", f"max_model_len={tokens // 16 * 16}")["errors"] == []


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"lmi-handler {VERSION}\n"


def test_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "serving.properties").write_text("option.dtype=fp16\noption.max_modle_len=9\n")
    environ = {"OPTION_HF_TOKEN": "hf_abcdef", "OPTION_API_KEYS": "s3cret"}
    found = resolve(model=str(model), environ=environ, options=["api_key=s3cret"])
    assert check(found, as_json=False, machine=CPU) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in text.splitlines() if line}
    assert rows["option.dtype"] == ["float16", "serving.properties line 1"]
    assert rows["option.max_model_len"] == ["256", "recommended from config.json"]
    assert "option.seed" not in rows
    assert rows["api_key"] == ["********", "--option api_key"]
    assert "s3cret" not in text
    assert "hf_abcdef" not in text
    assert "did you mean option.max_model_len?" in text
    assert "backend  rolling: " in text
    assert "room for" in text


def test_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_check(str(model), ["dtype=bf16"], True, {"HF_TOKEN": "hf_abcdef"}) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert found["options"]["option.dtype"] == {
        "value": "bfloat16",
        "source": "command line",
        "location": "--option dtype",
        "given": True,
    }
    assert found["options"]["option.limit_mm_per_prompt"]["value"] == {"image": 1, "video": 0, "audio": 0}
    assert found["memory"]["cache_bytes_per_token"] == TOKEN
    assert "hf_abcdef" not in text


@pytest.mark.parametrize("as_json", [True, False])
def test_errors_exit_with_1(model: Path, capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    assert run_check(str(model), ["dtype=x", "port=y"], as_json, {}) == 1
    text = capsys.readouterr().out
    assert "option.dtype" in text
    assert "port" in text
    if as_json:
        assert len(json.loads(text)["errors"]) == 2


def test_damaged_config_json(model: Path) -> None:
    (model / "config.json").write_text("{")
    (error,) = report(model, CPU)["errors"]
    assert "config.json cannot be read" in error


def test_memory_limit_of_the_container(tmp_path: Path) -> None:
    physical = host_memory(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(tmp_path) == physical
    (tmp_path / "memory.max").write_text("1048576\n")
    assert host_memory(tmp_path) == 1048576
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("4096\n")
    assert host_memory(tmp_path) == 4096


def test_a_model_that_the_embedded_engine_does_not_serve(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (error,) = report(model, CPU)["errors"]
    assert f"'bert' is not served by the embedded engine, which serves {served()}" in error
    assert "serve a model of a family that is served" in error
    known = {"model_type": "opt", "architectures": ["OPTForCausalLM"]}
    (model / "config.json").write_text(json.dumps(known))
    (error,) = report(model, CPU)["errors"]
    install = "install vllm>=0.32,<0.34 (pip install 'vllm>=0.32,<0.34') and "
    assert f"vLLM serves OPTForCausalLM: {install}set option.rolling_batch=vllm" in error


def test_the_models_own_handler_is_named(model: Path) -> None:
    assert report(model, CPU)["handler"] is None
    (model / "model.py").write_text("raise RuntimeError('it must not be run')\n")
    assert report(model, CPU)["handler"] is None
    (model / "model.py").write_text("def handle(inputs):\n    raise RuntimeError\n")
    assert report(model, CPU)["handler"] == "model.py"
    (model / "mine.py").touch()
    assert report(model, CPU, "entry_point=mine.py")["handler"] == "mine.py"
    assert report(model, CPU)["backend"] is None
    (model / "model.py").write_text("@djl_python.output_formatter\ndef f(response): return response\n")
    assert report(model, CPU)["formatters"] == "model.py"
    assert report(model, CPU)["handler"] is None
    (model / "handlers.py").touch()
    assert "rename it" in report(model, CPU)["errors"][0]
