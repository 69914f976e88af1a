"""Which backend serves a model, and the reason that is given."""

import subprocess
import sys
from pathlib import Path

import pytest

from handlers.backends.select import choose, remedy
from handlers.backends.vllm.compat import architectures
from properties.problem import ConfigurationError

LLAVA = ["LlavaForConditionalGeneration"]


def test_auto_takes_vllm_where_everything_speaks_for_it() -> None:
    choice = choose("auto", LLAVA, 1, vllm=True)
    assert choice.backend == "vllm"


@pytest.mark.parametrize(
    ("architectures", "accelerators", "vllm", "reason"),
    [
        (LLAVA, 1, False, "vLLM is not installed"),
        (LLAVA, 0, True, "no accelerator is visible"),
        (["MllamaForConditionalGeneration"], 1, True, "0.10.2"),
        (["FuyuForCausalLM"], 1, True, "0.25"),
        (["ChameleonForConditionalGeneration"], 1, True, "0.28"),
        (["Phi3VForCausalLM"], 1, True, "trust_remote_code"),
    ],
)
def test_auto_falls_to_the_embedded_engine_and_says_why(
    architectures: list[str], accelerators: int, vllm: bool, reason: str
) -> None:
    choice = choose("auto", architectures, accelerators, vllm=vllm)
    assert choice.backend == "rolling"
    assert reason in choice.reason


def test_phi3_v_with_remote_code_is_vllms() -> None:
    choice = choose("auto", ["Phi3VForCausalLM"], 1, vllm=True, trust_remote_code=True)
    assert choice.backend == "vllm"


def test_a_vllm_of_another_version_is_not_driven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "_version.py").write_text("__version__ = version = '0.27.1'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    choice = choose("auto", LLAVA, 1)
    assert choice.backend == "rolling"
    assert "vLLM 0.27.1" in choice.reason
    with pytest.raises(ConfigurationError, match=r"install vllm>=0\.32,<0\.34"):
        choose("vllm", LLAVA, 1)


def test_auto_asks_whether_vllm_lists_the_model() -> None:
    def choice(listed: set[str]) -> str:
        return choose("auto", LLAVA, 1, vllm=True, listed=listed).backend

    assert choice({"OtherForCausalLM"}) == "rolling"
    assert choice({*LLAVA, "OtherForCausalLM"}) == "vllm"
    assert choice(set()) == "vllm", "a list that cannot be read says nothing"
    assert choose("vllm", LLAVA, 1, vllm=True, listed={"Other"}).backend == "vllm"


def test_what_the_installed_version_lists_is_read_from_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "vllm"
    (package / "model_executor" / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "_version.py").write_text("__version__ = version = '0.32.0'\n")
    listing = "_MULTIMODAL_MODELS = {'NewForConditionalGeneration': ('new', 'New')}\n"
    (package / "model_executor" / "models" / "registry.py").write_text(listing)
    monkeypatch.syspath_prepend(str(tmp_path))
    architectures.cache_clear()
    try:
        assert choose("auto", ["NewForConditionalGeneration"], 1).backend == "vllm"
        other = choose("auto", LLAVA, 1)
    finally:
        architectures.cache_clear()
    assert other.reason == "the installed vLLM does not list LlavaForConditionalGeneration"


@pytest.mark.parametrize("rolling_batch", ["rolling", "disable"])
def test_the_embedded_engine_on_demand(rolling_batch: str) -> None:
    assert choose(rolling_batch, LLAVA, 8, vllm=True).backend == "rolling"  # type: ignore[arg-type]


def test_vllm_on_demand_needs_no_accelerator() -> None:
    assert choose("vllm", LLAVA, 0, vllm=True).backend == "vllm"


@pytest.mark.parametrize(
    ("architectures", "vllm", "reason"),
    [
        (LLAVA, False, "vLLM is not installed"),
        (["FuyuForCausalLM"], True, "FuyuForCausalLM"),
    ],
)
def test_vllm_on_demand_is_refused_with_the_reason(architectures: list[str], vllm: bool, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        choose("vllm", architectures, 1, vllm=vllm)


def test_choosing_imports_no_engine() -> None:
    code = (
        "import sys; from handlers.backends.select import choose; choose('auto', [], 0);"
        "sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_that_is_not_served_is_told_what_serves_it() -> None:
    told = remedy(["Qwen2VLForConditionalGeneration"], vllm=False)
    assert told.startswith("vLLM serves Qwen2VLForConditionalGeneration: install vllm>=0.32,<0.34 (pip install '")
    assert told.endswith("and set option.rolling_batch=vllm")
    code = remedy(["Phi3VForCausalLM"], vllm=False)
    assert code.endswith("and set option.rolling_batch=vllm and option.trust_remote_code=true")
    assert "0.10.2 was the last to serve Mllama" in remedy(["MllamaForConditionalGeneration"], vllm=False)
    assert "does not list NewModel either: serve a model of a family that is served" in remedy(["NewModel"], vllm=False)
