"""Options about what requests may say and how replies look."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from properties.field import Level, Variable, option
from properties.values import Seconds, Word

OutputFormat = Literal["json", "jsonlines", "sse", "json_chat", "jsonlines_chat", "sse_chat", "none"]


class ChatSettings(BaseModel):
    """Requests and replies"""

    chat_template: str | None = option(
        "Jinja chat template: a path (absolute, or relative to the model directory), the text itself, or the name of "
        "one of the model's own. Default: the model's own; of several `default`, and `tool_use` for requests with "
        "tools.",
        default=None,
        verbatim=True,
    )
    chat_template_content_format: Literal["auto", "string", "openai"] = option(
        "How the template wants a message's content: one string, a list of parts, or found out (auto).",
        default="auto",
    )
    trust_request_chat_template: bool = option(
        "Let requests bring a chat template of their own (`chat_template`). A template is a program: it may compute "
        "without end, so only for clients that are trusted.",
        default=False,
    )
    predict_timeout: Seconds = option(
        "Longest time for one request, waiting included; then it is aborted. Its body has as long again to come.",
        default=240,
        unit="s",
        variables=(
            Variable("SAGEMAKER_MODEL_SERVER_TIMEOUT_SECONDS", Level.SAGEMAKER),
            Variable("PREDICT_TIMEOUT"),
        ),
    )
    request_priorities: bool = option(
        "Let requests say their `priority`; without it every client's is ignored.", default=False
    )
    output_formatter: OutputFormat | None = option(
        "How replies of the LMI schema (json, jsonlines, sse) or of chat on LMI's routes (json_chat, jsonlines_chat, "
        "sse_chat) are framed: the last two forms of each also stream to clients that do not say whether to. "
        "Default: JSON; streams as jsonlines and sse_chat. A client's Accept header wins.",
        default=None,
    )
    tgi_compat: bool = option(
        "Answer the LMI schema as Text Generation Inference answers on managed endpoints: a list, TGI's keys, details "
        "unless declined, streams of server-sent events.",
        default=False,
    )
    enable_stateful_sessions: bool = option(
        "Open and close sessions for SageMaker's sticky routing.",
        default=True,
        variables=(Variable("SAGEMAKER_ENABLE_STATEFUL_SESSIONS", Level.SAGEMAKER),),
    )
    sessions_expiration: Seconds = option(
        "How long a session lasts from its opening.",
        default=1200,
        unit="s",
        variables=(Variable("SAGEMAKER_SESSIONS_EXPIRATION", Level.SAGEMAKER),),
    )
    guided_decoding_timeout: Seconds = option(
        "Longest time that a request's JSON schema, regular expression or grammar may take to compile; then the "
        "request is refused.",
        default=5,
        unit="s",
    )
    enable_auto_tool_choice: bool = option(
        'Let the model decide to call a tool (tool_choice "auto"); needs tool_call_parser.', default=False
    )
    tool_call_parser: Word | None = option(
        "How tool calls are read from the model's answer: hermes (also qwen3_json), llama3_json (llama4_json), "
        "mistral, pythonic (llama4_pythonic) or longcat. Where vLLM serves, also the name of any of its own "
        "(qwen3_coder, deepseek_v3, ...); vllm:hermes is vLLM's parser where both have one.",
        default=None,
    )
    reasoning_parser: Word | None = option(
        "How reasoning is separated from the answer: think (where prompt or answer opens a think tag), deepseek_r1 "
        "(also olmo3, step3, minimax_m2), qwen3 (glm45, nemotron_v3, holo2), deepseek_v3, mistral or seed_oss. "
        "Where vLLM serves, also the name of any of its own (granite, kimi_k2, ...), as for tools.",
        default=None,
    )
