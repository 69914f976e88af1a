"""Every option with its type, default and meaning, by topic; and `Settings`, the object that the program reads.

A new option is a field of one of these classes, read as `configuration.settings.NAME`. An argument of vLLM is also in a
table of `handlers/backends/vllm/arguments.py`. `python -m properties.document` then writes the pages again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, SecretStr
from pydantic.fields import FieldInfo

from properties.field import ROLLING, TRUE, VLLM, Level, Option, Variable, option, server_key
from properties.types import (
    Address,
    Amount,
    Count,
    Degree,
    Devices,
    Dtype,
    Engine,
    Fraction,
    Hosts,
    JsonObject,
    Length,
    Limits,
    MediaOptions,
    Names,
    Networks,
    Origins,
    Port,
    Positive,
    Seconds,
    Seed,
    Shape,
    Task,
    Tokens,
    Word,
)

STANDARD_HANDLER = "CUSTOM_FASTAPI_INVOCATION_HANDLER"
"""The variable of AWS's vLLM and SGLang images that names a handler as FILE.py:FUNCTION."""


def _standard_handler(text: str) -> tuple[str, str]:
    file, _, function = text.partition(":")
    file = "model.py" if file == "model" else file
    if not file.endswith(".py") or not function.isidentifier():
        raise ValueError("FILE.py:FUNCTION in the model's directory, or model:FUNCTION")
    return file, function


class ModelSettings(BaseModel):
    """Model and loading"""

    model_id: str | None = option(
        "What to serve: a directory, a Hugging Face hub id, or s3://bucket/prefix/.",
        variables=(Variable("HF_MODEL_ID"),),
    )
    revision: str | None = option(
        "Branch, tag or commit of a hub model.",
        variables=(Variable("HF_REVISION"), Variable("HF_MODEL_REVISION", Level.TGI)),
    )
    served_model_name: Names = option(
        "Names by which clients may request the model; replies show the first. Empty: the model's own name.", default=[]
    )
    task: Task = option(
        "What the model is for. Only generation is served.", default="auto", variables=(Variable("HF_TASK"),)
    )
    engine: Engine = server_key(
        "LMI's name of the engine. Only Python is allowed.",
        default="Python",
        replaced=(("MPI", "Python"), ("DeepSpeed", "Python"), ("FasterTransformer", "Python")),
    )
    dtype: Dtype = option(
        "Type of weights and activations. auto: the type in config.json, if the device can compute in it; see above.",
        default="auto",
    )
    quantize: Word | None = option(
        "Quantise while loading, e.g. fp8 or int8_per_channel_weight_only. The embedded engine has only int8, on a "
        "CPU: the decoder's weights and activations in 8 bits, in half the memory. Leave it out for a model that is "
        "already quantised: vLLM reads the method from its config.json.",
        embedded=("int8",),
        aliases=("quantization",),
        variables=(Variable("HF_MODEL_QUANTIZE", Level.TGI),),
    )
    load_format: Word = option(
        "How weights are read. The embedded engine reads safetensors (auto, safetensors), and with pt also "
        "pytorch_model.bin, a pickle whose code is never run. vLLM has more formats, e.g. dummy, runai_streamer; with "
        "auto it reads .bin if there are no safetensors.",
        default="auto",
        embedded=("auto", "safetensors", "pt"),
    )
    tokenizer_mode: Word = option(
        "vLLM's tokeniser implementation, e.g. auto, hf. Prompts are tokenised by this server anyway. For a model with "
        "Mistral's own files the default is mistral if the weights are in no other format, else hf.",
        default="auto",
        backends=VLLM,
    )
    trust_remote_code: bool = option(
        "Run Python code that comes with the model.",
        default=False,
        variables=(
            Variable("HF_MODEL_TRUST_REMOTE_CODE", Level.TGI),
            Variable("HF_TRUST_REMOTE_CODE", Level.TGI, instead="OPTION_TRUST_REMOTE_CODE"),
        ),
    )
    seed: Seed = option("The engine's seed, for requests that set none.", default=0, backends=VLLM)
    model_loading_timeout: Seconds = option(
        "Time limit until the model can generate.",
        default=1800,
        variables=(Variable("SAGEMAKER_STARTUP_TIMEOUT", Level.SAGEMAKER), Variable("MODEL_LOADING_TIMEOUT")),
    )
    entry_point: str | None = option(
        "Python file of a custom handler, relative to the model directory, which answers instead of an engine. "
        "Default: model.py, or code/model.py, if it defines the handler.",
        aliases=("entryPoint", "entrypoint"),
        variables=(
            Variable("DJL_ENTRY_POINT"),
            Variable(STANDARD_HANDLER, Level.CONTAINER, lambda text: _standard_handler(text)[0]),
            Variable("CUSTOM_SCRIPT_FILENAME", Level.CONTAINER, rank=1),
        ),
    )
    install_requirements: bool | None = server_key(
        "Install the requirements.txt in the model's directory at the start, as LMI does. Default: only if code of the "
        "model's own runs. That of a model from the hub is never installed.",
        variables=(Variable("STANDARD_AUTO_INSTALL_REQ", Level.CONTAINER),),
    )
    handler: str = option(
        "Function of the custom handler that is called.",
        default="handle",
        variables=(Variable(STANDARD_HANDLER, Level.CONTAINER, lambda text: _standard_handler(text)[1]),),
    )
    download_dir: str | None = server_key("Where models from s3:// are kept. Default: below the temporary directory.")
    offline: bool = option(
        "Never contact the hub: use what is on this machine.",
        default=False,
        variables=(Variable("HF_HUB_OFFLINE"), Variable("DJL_OFFLINE"), Variable("TRANSFORMERS_OFFLINE", rank=1)),
    )
    hf_token: SecretStr | None = option(
        "Hugging Face token for private and gated models.",
        secret=True,
        variables=(Variable("HF_TOKEN"), Variable("HUGGING_FACE_HUB_TOKEN", Level.TGI, instead="HF_TOKEN")),
    )
    enable_lora: bool = option("Serve LoRA adapters of the model.", default=False, backends=VLLM)
    max_loras: Positive = option(
        "Greatest number of adapters in one batch.", default=4, backends=VLLM, needs="enable_lora"
    )
    max_lora_rank: Positive = option("Highest rank of an adapter.", default=16, backends=VLLM, needs="enable_lora")
    max_cpu_loras: Count | None = option(
        "Greatest number of adapters kept in host memory. Default: max_loras.", backends=VLLM, needs="enable_lora"
    )
    allowed_adapter_path: str = option(
        "Directory of the adapters that `POST /adapters` may name, besides those in the model's own adapters/. Empty: "
        "no others.",
        default="/opt/ml",
        backends=VLLM,
        needs="enable_lora",
    )
    lora_dtype: Dtype = option("Type of adapter weights.", default="auto", backends=VLLM, needs="enable_lora")
    fully_sharded_loras: bool = option(
        "Shard adapter computation fully over a tensor-parallel group.",
        default=False,
        backends=VLLM,
        needs="enable_lora",
    )


def _cuda_graphs(text: str) -> str:
    return "false" if text.lower() in TRUE else "true"


class EngineSettings(BaseModel):
    """Rolling batch, memory and devices"""

    rolling_batch: Literal["auto", "vllm", "rolling", "disable"] = option(
        "Backend: vllm; rolling, the embedded engine; auto, which means vLLM if it is installed, finds an accelerator "
        "and serves the model, else the embedded engine; disable, which means the embedded engine, one request after "
        "the other, or auto if async_mode or entry_point select vLLM's asynchronous engine, as in LMI.",
        default="auto",
        replaced=(
            ("lmi-dist", "vllm"),
            ("scheduler", "auto"),
            ("trtllm", "auto"),
            ("tensorrtllm", "auto"),
            ("deepspeed", "auto"),
            ("tnx", "auto"),
        ),
    )
    async_mode: bool = option(
        "LMI's switch to vLLM's asynchronous engine: with true, rolling_batch=disable means auto. Requests are batched "
        "either way.",
        default=False,
    )
    tensor_parallel_degree: Degree = option(
        "Devices that share one replica of the model. max: all of them, divided by pipeline_parallel_degree; with "
        "vLLM, as many of these as the model's attention heads can be divided among.",
        default="max",
        aliases=("tensor_parallel_size",),
        variables=(Variable("TENSOR_PARALLEL_DEGREE"), Variable("SM_NUM_GPUS", Level.TGI)),
    )
    pipeline_parallel_degree: Positive = option(
        "Groups of layers, each on its own devices.",
        default=1,
        backends=VLLM,
        aliases=("pipeline_parallel_size",),
        variables=(Variable("PIPELINE_PARALLEL_DEGREE"),),
    )
    data_parallel_degree: Positive | None = option(
        "Replicas of the model inside vLLM. Default: devices divided by the other degrees, at most max_workers. "
        "Without accelerators: max_workers, min_workers or 1. On several machines: 1.",
        backends=VLLM,
        aliases=("data_parallel_size",),
    )
    max_rolling_batch_size: Positive = option(
        "Greatest number of requests that generate at the same time; the others wait in the queue.",
        default=256,
        aliases=("max_num_seqs",),
        variables=(Variable("MAX_BATCH_SIZE", Level.TGI),),
    )
    max_rolling_batch_prefill_tokens: Tokens = option(
        "Greatest number of tokens, of prompts and answers together, in one step. Default: chosen by the backend.",
        unit="tokens",
        aliases=("max_num_batched_tokens",),
        variables=(Variable("MAX_BATCH_PREFILL_TOKENS", Level.TGI),),
    )
    spare_engine: bool = option(
        "Keep a process waiting that has imported the engine (250 MB of memory): one that dies is replaced sooner.",
        default=True,
        backends=ROLLING,
    )
    max_step_ms: Positive = option(
        "While answers are generated, prompts and images of other requests are spread over steps of about this time, "
        "or of two and a half times what the answers alone take. Smaller: streams flow more evenly; larger: prompts "
        "are computed sooner.",
        default=80,
        unit="ms",
        backends=ROLLING,
    )
    max_model_len: Length = option(
        "Greatest number of tokens of prompt and answer together. Default: that of the model's config.json.",
        unit="tokens",
        variables=(Variable("MAX_TOTAL_TOKENS", Level.TGI),),
    )
    gpu_memory_utilization: Fraction = option(
        "Part of each accelerator's memory that weights and key/value cache may take.",
        default=0.9,
        variables=(Variable("CUDA_MEMORY_FRACTION", Level.TGI),),
    )
    kv_cache_memory_mb: Positive | None = option(
        "Key/value cache per device. Default: computed from the free memory.", unit="MiB"
    )
    block_size: Positive | None = option(
        "Tokens per block of the key/value cache. Default: chosen by the backend.", unit="tokens"
    )
    kv_cache_dtype: Word = option("Type of the key/value cache, e.g. auto, fp8.", default="auto", backends=VLLM)
    enable_prefix_caching: bool = option(
        "Reuse the key/value cache of a prompt's beginning if it has been computed before.", default=True
    )
    enable_chunked_prefill: bool = option(
        "Cut long prompts over several steps. The embedded engine always does.", default=True, backends=VLLM
    )
    enforce_eager: bool = option(
        "Disable CUDA graphs, and vLLM's compilation: faster start, slower steps.",
        default=False,
        variables=(Variable("ENABLE_CUDA_GRAPHS", Level.TGI, _cuda_graphs),),
    )
    cpu_offload_gb_per_gpu: Amount = option(
        "Weights kept in host memory, per accelerator.",
        default=0,
        backends=VLLM,
        unit="GiB",
        aliases=("cpu_offload_gb",),
    )
    speculative_config: JsonObject | None = option(
        'Speculative decoding, as vLLM\'s speculative_config. The embedded engine has method ngram: {"method": '
        '"ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 4}.'
    )
    kv_transfer_config: JsonObject | None = option(
        "Key/value cache transfer, as vLLM's kv_transfer_config.", backends=VLLM
    )


class VisionSettings(BaseModel):
    """Images"""

    limit_mm_per_prompt: Limits = option(
        "Greatest number of items per prompt, by modality; 1 image if images are not named. Only images are served.",
        default={"image": 1, "video": 0, "audio": 0},
    )
    enable_mm_embeds: bool = option(
        "Allow chat requests to send an image's embeddings, the output of the model's projector, instead of the image.",
        default=False,
    )
    image_placeholder_token: str | None = option(
        "Text that stands for an image in a prompt. Default: that of the model's processor.", verbatim=True
    )
    image_fetch_timeout: Seconds = option(
        "Time limit for fetching one image: connections, redirects and transfer together.",
        default=10,
        variables=(Variable("APHRODITE_IMAGE_FETCH_TIMEOUT"), Variable("VLLM_IMAGE_FETCH_TIMEOUT")),
    )
    image_fetch_max_redirects: Count = option(
        "Redirects followed for one image; every target is checked again.", default=3
    )
    allowed_media_domains: Hosts | None = option(
        "Images are fetched only from these hosts (exact names). Default: any public host."
    )
    image_fetch_allow_private: Networks = option(
        "Hosts, addresses and networks from which images may be fetched even if private, loopback or link-local.",
        default=[],
    )
    max_image_bytes: Positive = option("Largest image file, fetched or inline.", default=20 * 2**20, unit="bytes")
    max_image_pixels: Positive = option(
        "Largest image, width times height, checked before it is decoded.",
        default=89_478_485,
        unit="pixels",
        variables=(Variable("VLLM_MAX_IMAGE_PIXELS"),),
    )
    image_cache_mb: Count = option(
        "Host memory for a cache of decoded images, by content. The embedded engine takes half as much again for "
        "prepared images. 0: no cache.",
        default=32,
        unit="MiB",
    )
    image_memory_mb: Positive = option(
        "Host memory for the decoded images of running requests, besides the cache. A prompt whose images do not fit "
        "waits, and one that needs more than all of it is served alone. Decoding may use the same amount in addition.",
        default=1024,
        unit="MiB",
    )
    encoder_cache_mb: Count | None = option(
        "Device memory for a cache of the vision encoder's outputs, by content. 0: no cache. Default: 256 on an "
        "accelerator, 32 on a CPU.",
        backends=ROLLING,
        unit="MiB",
    )
    image_processor_backend: Literal["auto", "torchvision", "pil"] = option(
        "How images are resized and normalised. `torchvision` resizes several times faster than `pil`; in photographs "
        "a few values in a thousand differ, by one level of 255. The embedded engine does not need the package "
        "torchvision for it. `auto`: as transformers does here, which is `torchvision` if that is installed.",
        default="auto",
        backends=ROLLING,
    )
    media_io_kwargs: MediaOptions | None = option(
        "Background of transparent images: rgba_background_color of image, as red, green and blue from 0 to 255. "
        "Default: white."
    )
    mm_processor_kwargs: JsonObject | None = option(
        'Arguments for the model\'s image processor, e.g. {"max_pixels": 802816}.'
    )


OutputFormat = Literal["json", "jsonlines", "sse", "json_chat", "jsonlines_chat", "sse_chat", "none"]


class ChatSettings(BaseModel):
    """Requests and replies"""

    chat_template: str | None = option(
        "Jinja chat template: a path (absolute, or relative to the model directory), the text itself, or the name of "
        "one of the model's own. Default: the model's own; if it has several, `default`, and `tool_use` for requests "
        "with tools.",
        verbatim=True,
    )
    chat_template_content_format: Literal["auto", "string", "openai"] = option(
        "Form in which the template expects a message's content: one string, a list of parts (openai), or detected "
        "(auto).",
        default="auto",
    )
    trust_request_chat_template: bool = option(
        "Allow requests to bring their own chat template (`chat_template`). A template is a program that may never "
        "end, so this is only for trusted clients.",
        default=False,
    )
    predict_timeout: Seconds = option(
        "Time limit for a request, waiting included, after which it is aborted. Its body has the same time to arrive.",
        default=240,
        variables=(Variable("SAGEMAKER_MODEL_SERVER_TIMEOUT_SECONDS", Level.SAGEMAKER), Variable("PREDICT_TIMEOUT")),
    )
    request_priorities: bool = option("Allow requests to set their `priority`; otherwise it is ignored.", default=False)
    output_formatter: OutputFormat | None = option(
        "Format of replies of the LMI schema (json, jsonlines, sse) or of chat on LMI's routes (json_chat, "
        "jsonlines_chat, sse_chat). With jsonlines and sse, chat's included, replies are streamed unless the client "
        "declines. Default: JSON; streams as jsonlines and sse_chat. A client's Accept header wins."
    )
    tgi_compat: bool = option(
        "Answer the LMI schema as Text Generation Inference does on managed endpoints: a list, TGI's keys, details "
        "unless declined, streams of server-sent events.",
        default=False,
    )
    enable_stateful_sessions: bool = option(
        "Open and close sessions for SageMaker's sticky routing.",
        default=True,
        variables=(Variable("SAGEMAKER_ENABLE_STATEFUL_SESSIONS", Level.SAGEMAKER),),
    )
    sessions_expiration: Seconds = option(
        "How long a session lasts after it is opened.",
        default=1200,
        needs="enable_stateful_sessions",
        variables=(Variable("SAGEMAKER_SESSIONS_EXPIRATION", Level.SAGEMAKER),),
    )
    guided_decoding_timeout: Seconds = option(
        "Time limit for compiling a request's JSON schema, regular expression or grammar, after which the request is "
        "refused.",
        default=5,
    )
    enable_auto_tool_choice: bool = option(
        'Let the model decide to call a tool (tool_choice "auto"); needs tool_call_parser.', default=False
    )
    tool_call_parser: Word | None = option(
        "How tool calls are read from the model's output: hermes (also qwen3_json), llama3_json (llama4_json), "
        "mistral, pythonic (llama4_pythonic) or longcat. Where vLLM serves, also the name of any of its own "
        "(qwen3_coder, deepseek_v3, ...); vllm:hermes is vLLM's parser where both have one."
    )
    reasoning_parser: Word | None = option(
        "How reasoning is separated from the answer: think (if prompt or output opens a think tag), deepseek_r1 (also "
        "olmo3, step3, minimax_m2), qwen3 (glm45, nemotron_v3, holo2), deepseek_v3, mistral or seed_oss. Where vLLM "
        "serves, also the name of any of its own (granite, kimi_k2, ...), as for tools."
    )


def _megabytes(text: str) -> str:
    try:
        return str(int(float(text) * 2**20))
    except (ValueError, OverflowError):
        raise ValueError("a number of MiB") from None


class ServerSettings(BaseModel):
    """Server and process"""

    host: Address = server_key(
        "Address to listen on. Default of `lmi serve` and `lmi run`: 127.0.0.1.", default="0.0.0.0"
    )
    port: Port = server_key(
        "Port to listen on.", default=8080, variables=(Variable("SAGEMAKER_BIND_TO_PORT", Level.SAGEMAKER),)
    )
    api_key: SecretStr | None = server_key(
        "Key that clients must send as `Authorization: Bearer <key>`, or a JSON list of such keys; also written "
        "`option.api_key` and `OPTION_API_KEY`. Default: no key is required.",
        secret=True,
        variables=(Variable("VLLM_API_KEY"), Variable("APHRODITE_API_KEY")),
    )
    page: bool = option(
        "Serve a page at `GET /` for trying images and watching requests. Default of `lmi serve` and `lmi run`: true, "
        "but false with an API key.",
        default=False,
    )
    job_queue_size: Positive = server_key(
        "Greatest number of waiting requests, each counted n times if it asks for n answers; one more is answered 429.",
        default=1000,
        unit="requests",
        variables=(Variable("MAX_CONCURRENT_REQUESTS", Level.TGI),),
    )
    min_workers: Positive | None = server_key(
        "Replicas of the model on a CPU if max_workers is not set; /ping is 200 when one is ready.",
        aliases=("minWorkers",),
        variables=(Variable("SAGEMAKER_NUM_MODEL_WORKERS", Level.SAGEMAKER),),
    )
    max_workers: Positive | None = server_key(
        "Replicas of the model. Default: devices divided by tensor_parallel_degree. Without accelerators: min_workers "
        "if set, else 2 with rolling if the weights take at most 1 GiB and there are 2 cores and enough memory, else "
        "1.",
        aliases=("maxWorkers",),
        variables=(Variable("SAGEMAKER_NUM_MODEL_WORKERS", Level.SAGEMAKER),),
    )
    load_on_devices: Devices = server_key("Devices to use.", default="*")
    retry_threshold: Count = server_key(
        "Failures of the engine that are answered by restarting it; after one more, the process ends with status 1.",
        default=3,
    )
    engine_suspect_timeout: Seconds = server_key(
        "Time without a sign of life from the engine, while requests run, after which /ping answers 503. It must be "
        "longer than the longest step.",
        default=20,
        backends=VLLM,
    )
    engine_stuck_timeout: Seconds | None = server_key(
        "Time that an engine has to give a requested sign of life, after which it is killed and restarted, and its "
        "requests fail. It must be longer than a step that compiles. Default: 300 with vLLM, which has the same limit; "
        "else 120."
    )
    max_request_size: Positive = server_key(
        "Largest request body; a larger one is answered 413.",
        default=64 * 2**20,
        unit="bytes",
        variables=(
            Variable("SAGEMAKER_MAX_REQUEST_SIZE", Level.SAGEMAKER),
            Variable("SAGEMAKER_MAX_PAYLOAD_IN_MB", Level.SAGEMAKER, _megabytes, rank=1),
            Variable("PAYLOAD_LIMIT", Level.TGI),
        ),
    )
    request_memory_mb: Positive = option(
        "Host memory for request bodies. Each counts from its arrival until its reply ends, the images in it only "
        "until the engine has them. One that does not fit is answered 429. Never less than max_request_size.",
        default=512,
        unit="MiB",
    )
    chunked_read_timeout: Seconds = server_key(
        "Longest wait for the first part of a reply, or for the next one, after which the request is aborted.",
        default=120,
    )
    drain_timeout: Seconds = server_key(
        "Time for running requests to finish after SIGTERM. SageMaker kills the container after 30 s.",
        default=30,
        variables=(Variable("GRACEFUL_TERMINATION_TIMEOUT", Level.TGI),),
    )
    multi_model: bool = server_key(
        "Serve several models, each in processes of its own, which are loaded and unloaded through `/models`; MODEL is "
        "a directory of those to load at the start.",
        default=False,
        variables=(Variable("SAGEMAKER_MULTI_MODEL", Level.SAGEMAKER),),
    )
    max_models: Positive = server_key("With multi_model: models that may be loaded.", default=16)
    models_memory_mb: Positive | None = server_key(
        "With multi_model: host memory for all models together, as estimated before each is loaded. Default: nine "
        "tenths of the container's.",
        unit="MiB",
    )
    model_idle_timeout: Seconds | None = server_key(
        "With multi_model: time without requests after which a model's processes are ended; its next request starts "
        "them again. Default: never."
    )
    allowed_model_path: str = server_key(
        "With multi_model: `POST /models` may name models below this directory, besides those in MODEL. Empty: no "
        "others.",
        default="/opt/ml",
    )
    cors_allowed_origin: Origins = server_key(
        "Origins of web pages that may call the server from a browser, such as https://app.example; * for any. "
        "Default: none.",
        default=[],
        aliases=("cors_allow_origin",),
        variables=(Variable("CORS_ALLOW_ORIGIN", Level.TGI),),
    )
    request_id_header_key: str | None = server_key(
        "Header that carries the request's id. Default: X-Amzn-SageMaker-Inference-Id, else x-request-id."
    )
    log_format: Literal["text", "json"] = server_key("Format of log lines.", default="text")
    log_level: Literal["debug", "info", "warning", "error"] = server_key(
        "Lowest severity that is logged. Only `debug` shows where in the code a start failed.", default="info"
    )
    log_prompts: bool = server_key("Write prompts and answers to the log. Images never are.", default=False)
    strict_options: bool = server_key("Make an unknown option an error instead of a warning.", default=False)


class RetiredSettings(BaseModel):
    """Retired: read from the model itself"""

    image_input_type: Literal["pixel_values", "image_features"] | None = option(
        "Form of an image for the model; only pixel_values is served."
    )
    image_token_id: Count | None = option("The token that stands for an image in a prompt.")
    image_input_shape: Shape | None = option("Shape of the largest prepared image.")
    image_feature_size: Positive | None = option("Tokens of an image with image_input_shape.", unit="tokens")


RETIRED = tuple(RetiredSettings.model_fields)


TOPICS: tuple[type[BaseModel], ...] = (
    ModelSettings,
    EngineSettings,
    VisionSettings,
    ChatSettings,
    ServerSettings,
    RetiredSettings,
)
"""The parts of `Settings` in the order of the documentation; each class's docstring is its heading."""


class Settings(RetiredSettings, ServerSettings, ChatSettings, VisionSettings, EngineSettings, ModelSettings):
    """The effective configuration. `Settings()` is all defaults; `resolve` reads the user's sources."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def options(topic: type[BaseModel] = Settings) -> Iterator[tuple[str, FieldInfo, Option]]:
    """Yield (attribute name, field, definition) of every option of a topic, or of all, in order."""
    for name, field in topic.model_fields.items():
        yield name, field, next(item for item in field.metadata if isinstance(item, Option))
