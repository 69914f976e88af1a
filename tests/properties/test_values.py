"""How text becomes a value."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from properties.configuration import Configuration, ConfigurationError, resolve


def value(name: str, text: str) -> Any:
    return getattr(configure([f"{name}={text}"]).settings, name)


def configure(options: Sequence[str] = (), environ: Mapping[str, str] | None = None) -> Configuration:
    return resolve(model="org/model", environ=environ or {}, options=options)


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "1", "yes", "on", "t", "y", " true ", "true\t"])
def test_one_way_to_read_true(text: str) -> None:
    assert value("enforce_eager", text) is True
    assert value("enable_lora", text) is True


@pytest.mark.parametrize("text", ["false", "False", "0", "no", "off", "f", "n", "false "])
def test_one_way_to_read_false(text: str) -> None:
    assert value("enable_prefix_caching", text) is False


@pytest.mark.parametrize("text", ["64", "64.0", " 64 "])
def test_whole_number(text: str) -> None:
    assert value("max_rolling_batch_size", text) == 64


@pytest.mark.parametrize("text", ["max", "max "])
def test_tensor_parallel_degree_max(text: str) -> None:
    assert value("tensor_parallel_degree", text) == "max"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fp32", "float32"),
        ("float32", "float32"),
        ("fp16", "float16"),
        ("float16", "float16"),
        ("bf16", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("auto", "auto"),
        ("FP16", "float16"),
        ("BFloat16", "bfloat16"),
        ("float", "float32"),
        ("Half", "float16"),
        ("AUTO", "auto"),
        ("torch.bfloat16", "bfloat16"),
    ],
)
def test_dtype_spellings(text: str, expected: str) -> None:
    assert value("dtype", text) == expected


@pytest.mark.parametrize(
    ("text", "image", "video"),
    [
        ('{"image":4,"video":0}', 4, 0),
        ('{"image": {"count": 4, "width": 512}, "video": 2}', 4, 2),
        ("image=4,video=2", 4, 2),
        ("image=4, video=2", 4, 2),
        ('{"image": 2}', 2, 0),
    ],
)
def test_limit_mm_per_prompt(text: str, image: int, video: int) -> None:
    limits = value("limit_mm_per_prompt", text)
    assert (limits["image"], limits["video"], limits["audio"]) == (image, video, 0)


def test_limit_is_one_per_modality_by_default() -> None:
    assert configure().settings.limit_mm_per_prompt == {"image": 1, "video": 0, "audio": 0}


@pytest.mark.parametrize(
    "text",
    ["4", '{"image":', '{"picture": 1}', '{"image": -1}', '{"image": {"width": 5}}', "image", '["image"]'],
)
def test_limit_that_makes_no_sense(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"option.limit_mm_per_prompt .*allowed: counts from 0"):
        value("limit_mm_per_prompt", text)


@pytest.mark.parametrize("text", ["1.2.3.4.5", "256.0.0.1", "1.2.3.", "."])
def test_an_impossible_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"host = .*not an IP address; allowed: an IP address or a host name"):
        value("host", text)


@pytest.mark.parametrize("text", ["0.0.0.0", "127.1", "::1", "localhost", "10.example"])
def test_an_address_or_a_name_can_be_listened_on(text: str) -> None:
    assert value("host", text) == text


def test_lists_and_objects() -> None:
    assert value("allowed_media_domains", "a.org, b.org") == ["a.org", "b.org"]
    assert value("served_model_name", '["a", "b,c"]') == ["a", "b,c"]
    assert value("image_fetch_allow_private", "10.0.0.0/8,box,[::1]") == ["10.0.0.0/8", "box", "[::1]"]
    assert value("cors_allowed_origin", "https://a.org:8443,null") == ["https://a.org:8443", "null"]
    origins = [
        "http://a.org:443",
        "http://[::1]:8080",
        "https://xn--bcher-kva.example",
        "chrome-extension://ab",
    ]
    assert value("cors_allowed_origin", ",".join(origins)) == origins
    assert value("load_on_devices", "0;2") == [0, 2]
    assert value("load_on_devices", "*") == "*"
    assert value("load_on_devices", "gpu0;GPU1") == [0, 1]
    assert value("mm_processor_kwargs", '{"max_pixels": 5}') == {"max_pixels": 5}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://*.app.example", "has a wildcard: write each origin, or * alone for any"),
        ("https://App.Example", "write https://app.example;"),
        ("HTTPS://app.example", "write https://app.example;"),
        ("https://app.example:443", "write https://app.example;"),
        ("http://[0::1]:80", "write http://[::1];"),
        ("https://bücher.example:08443", "write https://xn--bcher-kva.example:8443;"),
    ],
)
def test_an_origin_that_no_browser_sends_says_what_to_write(text: str, told: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        value("cors_allowed_origin", text)
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dtype", "fp8"),
        ("enforce_eager", "maybe"),
        ("max_rolling_batch_size", "64.5"),
        ("max_rolling_batch_size", "0"),
        ("tensor_parallel_degree", "all"),
        ("gpu_memory_utilization", "1.1"),
        ("predict_timeout", "nan"),
        ("predict_timeout", "inf"),
        ("rolling_batch", "neo"),
        ("port", "70000"),
        ("image_fetch_allow_private", "10.0.0.1/8"),
        ("image_fetch_allow_private", "http://box"),
        ("allowed_media_domains", "https://a.org/"),
        ("allowed_media_domains", "*.a.org"),
        ("allowed_media_domains", "a.org:8080"),
        ("cors_allowed_origin", "app.example"),
        ("cors_allowed_origin", "https://app.example/"),
        ("cors_allowed_origin", "https://app.example:70000"),
        ("cors_allowed_origin", "https://user@app.example"),
        ("cors_allowed_origin", "https://[::g]"),
        ("mm_processor_kwargs", "[1]"),
        ("output_formatter", "xml"),
        ("output_formatter", "3p"),
        ("output_formatter", "3p_stream"),
        ("output_formatter", "my_function"),
        ("load_on_devices", ";"),
        ("load_on_devices", "cuda"),
        ("engine", "OnnxRuntime"),
        ("task", "text-embedding"),
    ],
)
def test_bad_value_names_option_value_source_and_what_is_allowed(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        value(name, text)
    (problem,) = raised.value.problems
    assert problem.option == name
    for part in (name, repr(text), f"--option {name}", "allowed: "):
        assert part in str(problem)


def test_text_options_keep_spaces_only_where_they_matter() -> None:
    template = "{{ messages }}\nAssistant: "
    assert value("chat_template", template) == template
    assert value("image_placeholder_token", "<image> ") == "<image> "
    assert value("tokenizer_mode", " mistral ") == "mistral"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("rolling_batch", "lmi-dist", "vllm"),
        ("rolling_batch", "scheduler", "auto"),
        ("rolling_batch", "LMI-Dist", "vllm"),
        ("rolling_batch", "trtllm", "auto"),
        ("rolling_batch", "deepspeed", "auto"),
        ("entry_point", "djl_python.huggingface", None),
        ("engine", "MPI", "Python"),
        ("engine", "DeepSpeed", "Python"),
    ],
)
def test_old_value_is_understood_with_a_warning(name: str, old: str, new: str | None) -> None:
    found = configure([f"{name}={old}"])
    assert getattr(found.settings, name) == new
    (warning,) = found.warnings
    assert "deprecated" in str(warning)
    assert repr(old) in str(warning)


def test_deprecated_switch_names_its_replacement() -> None:
    found = configure(environ={"OPTION_LOAD_IN_8BIT": "true"})
    assert found.settings.quantize == "bitsandbytes"
    (warning,) = found.warnings
    assert "stands for option.quantize=bitsandbytes: write option.quantize=int8_per_channel" in str(warning)
    off = configure(environ={"OPTION_LOAD_IN_8BIT": "false"})
    assert off.settings.quantize is None


def test_deprecated_variable_names_its_replacement() -> None:
    found = configure(environ={"HF_TRUST_REMOTE_CODE": "true"})
    assert found.settings.trust_remote_code is True
    assert [str(warning) for warning in found.warnings] == [
        "HF_TRUST_REMOTE_CODE is deprecated: write OPTION_TRUST_REMOTE_CODE"
    ]


def test_settings_are_frozen_and_hide_secrets() -> None:
    found = configure(["api_key=s3cret"], {"HF_TOKEN": "hf_s3cret"})
    assert found.settings.api_key is not None
    assert found.settings.api_key.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(found)
    assert found.sources["hf_token"].raw == "********"
    with pytest.raises(ValueError, match="frozen"):
        found.settings.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("task", "Image-Text-to-Text", "generate"),
        ("task", "visual-question-answering", "generate"),
        ("task", "TEXT-GENERATION", "text-generation"),
        ("rolling_batch", "Auto", "auto"),
        ("rolling_batch", "vLLM", "vllm"),
        ("tensor_parallel_degree", "MAX", "max"),
        ("engine", "python", "Python"),
        ("output_formatter", "JSONLines", "jsonlines"),
        ("chat_template_content_format", "OpenAI", "openai"),
        ("log_format", "JSON", "json"),
        ("image_processor_backend", "PIL", "pil"),
        ("lora_dtype", "BF16", "bfloat16"),
        ("quantize", "AWQ", "awq"),
        ("load_format", "SafeTensors", "safetensors"),
        ("tokenizer_mode", "Mistral", "mistral"),
        ("kv_cache_dtype", "FP8_E5M2", "fp8_e5m2"),
        ("tool_call_parser", "Hermes", "hermes"),
        ("reasoning_parser", "DeepSeek_R1", "deepseek_r1"),
        ("limit_mm_per_prompt", '{"Image": 3}', {"image": 3, "video": 0, "audio": 0}),
    ],
)
def test_words_mean_the_same_in_capital_letters(name: str, text: str, expected: object) -> None:
    found = configure([f"{name}={text}"])
    assert getattr(found.settings, name) == expected
    assert found.warnings == []


def test_the_pipelines_task_may_be_written_in_any_case() -> None:
    assert configure(environ={"HF_TASK": "Image-Text-to-Text"}).settings.task == "generate"
    assert configure(environ={"ENABLE_CUDA_GRAPHS": "Yes"}).settings.enforce_eager is False
    assert configure(environ={"OPTION_LOAD_IN_8BIT": "1"}).settings.quantize == "bitsandbytes"


def test_words_of_any_case_agree() -> None:
    assert configure(["dtype=FP16", "dtype=float16", "max_num_seqs=3"]).settings.dtype == "float16"


def test_names_keep_their_letters() -> None:
    assert value("served_model_name", "LLaVA") == ["LLaVA"]
    assert value("revision", "Main") == "Main"
    assert value("chat_template", "{{ AUTO }}") == "{{ AUTO }}"


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("engine", "OnnxRuntime", "an engine of DJL's for other kinds of models; this server generates text"),
        ("task", "Feature-Extraction", "embeddings, classes and scores are not served"),
    ],
)
def test_what_lmi_serves_besides_text_is_refused_with_the_reason(name: str, text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} = '{text}' .*: {reason}; allowed: "):
        value(name, text)
