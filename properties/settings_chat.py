"""Options about what requests may say and how replies look."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from properties.field import NOT_YET, Level, Variable, option
from properties.values import Seconds

OutputFormat = Literal["json", "jsonlines", "sse", "json_chat", "jsonlines_chat", "sse_chat", "none"]


class ChatSettings(BaseModel):
    """Requests and replies"""

    chat_template: str | None = option(
        "Jinja chat template: a path (absolute, or relative to the model directory) or the text itself. "
        "Default: the model's own.",
        default=None,
        verbatim=True,
    )
    chat_template_content_format: Literal["auto", "string", "openai"] = option(
        "How the template wants a message's content: one string, a list of parts, or found out (auto).",
        default="auto",
    )
    predict_timeout: Seconds = option(
        "Longest time for one request, waiting included; then it is aborted.",
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
        "How streams of the LMI schema are framed: sse and sse_chat as server-sent events, any other as JSON "
        "lines. Chat streams are always server-sent events.",
        default=None,
    )
    tgi_compat: bool = option(
        "Replies exactly as Text Generation Inference writes them.", default=False, backends=NOT_YET
    )
    enable_auto_tool_choice: bool = option(
        'Let the model decide to call a tool (tool_choice "auto").', default=False, backends=NOT_YET
    )
    tool_call_parser: str | None = option(
        "How tool calls are read from the model's answer, e.g. hermes, llama3_json, mistral.",
        default=None,
        backends=NOT_YET,
    )
    reasoning_parser: str | None = option(
        "How reasoning is told from the answer, e.g. deepseek_r1, qwen3.", default=None, backends=NOT_YET
    )
