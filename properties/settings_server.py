"""Keys of the HTTP server and the process: written without `option.`, set by SERVING_*."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, SecretStr

from properties.field import VLLM, Level, Variable, option, server_key
from properties.values import Count, Devices, Names, Port, Positive, Seconds


def _megabytes(text: str) -> str:
    try:
        return str(int(float(text) * 2**20))
    except (ValueError, OverflowError):
        raise ValueError("a number of MiB") from None


class ServerSettings(BaseModel):
    """Server and process"""

    host: str = server_key("Address to listen on; `lmi serve` and `lmi run`: 127.0.0.1.", default="0.0.0.0")
    port: Port = server_key(
        "Port to listen on.",
        default=8080,
        variables=(Variable("SAGEMAKER_BIND_TO_PORT", Level.SAGEMAKER),),
    )
    api_key: SecretStr | None = server_key(
        "Key that clients must send as `Authorization: Bearer <key>`, or a JSON list of such keys; also written "
        "`option.api_key` and `OPTION_API_KEY`. Default: none is asked for.",
        default=None,
        secret=True,
        variables=(Variable("VLLM_API_KEY"), Variable("APHRODITE_API_KEY")),
    )
    job_queue_size: Positive = server_key(
        "Most requests that wait, each as often as it asks for answers (n); one more is answered 429.",
        default=1000,
        unit="requests",
        variables=(Variable("MAX_CONCURRENT_REQUESTS", Level.TGI),),
    )
    min_workers: Positive | None = server_key(
        "Copies of the model on a CPU where max_workers is not set; /ping is 200 when one is ready.",
        default=None,
        aliases=("minWorkers",),
        variables=(Variable("SAGEMAKER_NUM_MODEL_WORKERS", Level.SAGEMAKER),),
    )
    max_workers: Positive | None = server_key(
        "Copies of the model. Default: devices divided by tensor_parallel_degree; min_workers or 1 without "
        "accelerators.",
        default=None,
        aliases=("maxWorkers",),
        variables=(Variable("SAGEMAKER_NUM_MODEL_WORKERS", Level.SAGEMAKER),),
    )
    load_on_devices: Devices = server_key("Devices to use.", default="*")
    retry_threshold: Count = server_key(
        "Engine failures that a restart answers; after one more the process ends with status 1.", default=3
    )
    engine_suspect_timeout: Seconds = server_key(
        "While requests run: time without a word from the engine after which /ping answers 503. Longer than its "
        "longest step.",
        default=20,
        unit="s",
        backends=VLLM,
    )
    engine_stuck_timeout: Seconds | None = server_key(
        "Time that an engine which is asked for a sign may owe it; then it is killed and started again, and its "
        "requests fail. Longer than a step that compiles. Default: 300 with vLLM, like its own limit; else 120.",
        default=None,
        unit="s",
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
        "Host memory for request bodies, counted from their arrival until their replies end, and of images "
        "until the engine has them; one that finds no room is answered 429. Never less than max_request_size.",
        default=512,
        unit="MiB",
    )
    chunked_read_timeout: Seconds = server_key(
        "Longest pause between two parts of a reply, the first included; then the request is aborted.",
        default=120,
        unit="s",
    )
    drain_timeout: Seconds = server_key(
        "Time that running requests get to finish after SIGTERM. SageMaker kills the container after 30 s.",
        default=30,
        unit="s",
        variables=(Variable("GRACEFUL_TERMINATION_TIMEOUT", Level.TGI),),
    )
    cors_allowed_origin: Names = server_key(
        "Web pages that may call the server from a browser, as https://app.example; * for any. Default: none.",
        default=[],
        aliases=("cors_allow_origin",),
        variables=(Variable("CORS_ALLOW_ORIGIN", Level.TGI),),
    )
    request_id_header_key: str | None = server_key(
        "Header that carries the request's id. Default: X-Amzn-SageMaker-Inference-Id, else x-request-id.",
        default=None,
    )
    log_format: Literal["text", "json"] = server_key("Form of log lines.", default="text")
    log_level: Literal["debug", "info", "warning", "error"] = server_key(
        "Least severe lines that are written. Only `debug` shows where in the code a start failed.",
        default="info",
    )
    log_prompts: bool = server_key("Write prompts and answers to the log. Images never are.", default=False)
    strict_options: bool = server_key("An unknown option is an error instead of a warning.", default=False)
