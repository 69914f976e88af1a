"""The names that are used of vLLM are where `compat` looks for them, in every version at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from handlers.backends.vllm import compat
from handlers.errors import InvalidConfiguration

OLDER = Path(sys.prefix, "older")
"""Where `make install-vllm` puts an older version beside the one that serves."""

LOOK = """
import inspect
from dataclasses import fields
from handlers.backends.vllm.compat import load, load_parsing
from handlers.backends.vllm.fields import architectures, engine_argument_names
from handlers.backends.vllm.fields import reasoning_parser_names, tool_parser_names
from handlers.backends.vllm.options import ALWAYS, WHERE_GIVEN
from handlers.backends.vllm.sampling import _SAME, _TRANSLATED

vllm = load()
names = {field.name for field in fields(vllm.AsyncEngineArgs) if not field.name.startswith("_")}
assert names == engine_argument_names(), names ^ engine_argument_names()
ours = {*ALWAYS.values(), *WHERE_GIVEN.values(), "limit_mm_per_prompt", "served_model_name", "scheduling_policy"}
assert ours <= names, ours - names
sampling = set(vllm.SamplingParams.__struct_fields__)
assert {*_SAME, *_TRANSLATED, "n", "output_kind", "structured_outputs", "detokenize"} <= sampling
generate = inspect.signature(vllm.AsyncLLM.generate).parameters
assert list(generate)[1:4] == ["prompt", "sampling_params", "request_id"]
assert {"priority", "lora_request"} <= set(generate)
assert "stat_loggers" in inspect.signature(vllm.AsyncLLM.from_engine_args).parameters
assert "timeout" in inspect.signature(vllm.AsyncLLM.shutdown).parameters
assert {"max_total_tokens", "add_special_tokens"} <= set(inspect.signature(vllm.TokenizeParams).parameters)
kinds = {"json", "regex", "choice", "grammar", "json_object"}
assert kinds <= set(inspect.signature(vllm.StructuredOutputsParams).parameters)
known = architectures()
assert {"LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "LlamaForCausalLM"} <= known
assert not {"MllamaForConditionalGeneration", "BertModel"} & known
parser = vllm.AsyncEngineArgs.add_cli_args(vllm.ArgumentParser())
assert {"max_logprobs", "compilation_config"} <= {action.dest for action in parser._actions}
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
assert tool_parser_names() == set(ToolParserManager.list_registered()) > {"hermes", "qwen3_coder", "kimi_k2"}
assert reasoning_parser_names() == set(ReasoningParserManager.list_registered()) > {"qwen3", "granite"}
parsing = load_parsing()
kind = parsing.ParserManager.get_parser(
    tool_parser_name="hermes", reasoning_parser_name="granite", enable_auto_tools=True, is_harmony=False
)
assert list(inspect.signature(kind.parse_delta).parameters)[1:] == [
    "delta_text", "delta_token_ids", "request", "prompt_token_ids", "finished"
]
assert {"enable_auto_tools", "model_output_token_ids"} <= set(inspect.signature(kind.parse).parameters)
request = parsing.ChatCompletionRequest(messages=[{"role": "user", "content": ""}], tool_choice="none")
assert request.skip_special_tokens
print("version", vllm.version)
"""


@pytest.mark.parametrize("place", [None, OLDER], ids=["serving", "older"])
def test_every_name_is_found(place: Path | None) -> None:
    if place is not None and not place.is_dir():
        pytest.skip("no older version beside the one that serves")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in (place, Path.cwd()) if p)}
    found = subprocess.run([sys.executable, "-P", "-c", LOOK], env=environ, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    version = found.stdout.rpartition("version ")[2].strip()
    assert (version == compat.installed_version()) == (place is None)


@pytest.mark.parametrize("version", [None, "0.27.1", "0.34.0", "1.0", "dev"])
def test_a_version_outside_the_range_is_refused_with_what_to_install(version: str | None) -> None:
    with pytest.raises(InvalidConfiguration, match=r"install vllm>=0\.28,<0\.34"):
        compat.check_version(version)


@pytest.mark.parametrize("version", ["0.28.0", "0.32.0", "0.33.1.post2", "0.33.0rc1"])
def test_a_version_inside_is_taken(version: str) -> None:
    compat.check_version(version)
