"""Chat completions, as OpenAI documents them and vLLM extends them: from the body to a `Task`."""

from __future__ import annotations

from typing import Any

from engine.sampling_params import shown
from handlers.errors import InvalidRequest
from handlers.protocols.base import Conventions, Task, sampling_params
from handlers.protocols.body import convert
from handlers.protocols.constraints import read_constraint
from handlers.protocols.misspelt import KnownNames
from handlers.protocols.openai.answers import answer_form
from handlers.protocols.openai.fields import (
    CommonBody,
    StreamOptions,
    check_stream,
    common_sampling,
    count_answers,
    known_names,
    refuse_unsupported,
)
from handlers.protocols.openai.messages import misspelt, read_messages
from handlers.protocols.openai.reply import ChatWriter
from handlers.protocols.openai.tools import Tools, read_tools
from handlers.protocols.sampler_fields import sampler_names
from handlers.request import ChatPrompt, GenerationRequest, TextPart

MOST_NAMES = 8
"""Of templates that an error lists."""


class ChatBody(CommonBody, kw_only=True):
    """A request's own fields. Those of the first block are OpenAI's, the others vLLM's."""

    messages: list[Any]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    echo: bool | None = None
    return_prompt_text: bool | None = None
    include_reasoning: bool | None = None


_NAMES = known_names(ChatBody)


def read_chat(
    body: dict[str, Any], conventions: Conventions, *, request_id: str, adapter: str | None = None
) -> Task:
    """Raises InvalidRequest naming the field; nothing has been fetched or generated then.

    adapter: named in a header; it wins over the body's `adapters`.
    """
    refuse_unsupported(body, ChatBody)
    asked = convert(body, ChatBody)
    if asked.modalities is not None and asked.modalities != ["text"]:
        raise InvalidRequest('modalities: this server answers with ["text"] only', param="modalities")
    tools = read_tools(
        tools=asked.tools,
        choice=asked.tool_choice,
        parallel=asked.parallel_tool_calls,
        functions=asked.functions,
        function_call=asked.function_call,
        formats=conventions.formats,
    )
    stream, n = check_stream(asked), count_answers(asked)
    names = sampler_names(asked)
    if asked.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    model = asked.model or conventions.model_name
    prompt = _prompt(asked, conventions, tools)
    constraint = read_constraint(
        response_format=asked.response_format, structured_outputs=asked.structured_outputs, guided=body
    )
    values = _sampling(asked)
    sampling = sampling_params(values, conventions.sampling, names)
    form = answer_form(
        tools,
        constraint,
        conventions,
        prompt.template_kwargs,
        hide_reasoning=asked.include_reasoning is False,
    )
    request = GenerationRequest(
        request_id=request_id,
        prompt=prompt,
        sampling=form.applied(sampling),
        n=n,
        stream=stream,
        model=asked.model,
        adapter=adapter if adapter is not None else asked.adapters or None,
        priority=asked.priority or 0,
        truncate_prompt_tokens=asked.truncate_prompt_tokens,
        truncation_side=asked.truncation_side or "left",
        max_tokens_is_default=values["max_tokens"] is None and sampling.max_tokens is not None,
        constraint=form.constraint,
        names=names,
    )
    options = asked.stream_options or StreamOptions()
    writer = ChatWriter(
        reply_id=f"chatcmpl-{asked.request_id or request_id}",
        model=model,
        top_logprobs=(asked.top_logprobs or 0) if asked.logprobs and not form.hides_tokens else None,
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.continuous_usage_stats),
        token_ids=bool(asked.return_token_ids) and not form.hides_tokens,
        tokens_as_ids=bool(asked.return_tokens_as_token_ids),
        prompt_text=bool(asked.return_prompt_text),
        echo=_echo(prompt) if asked.echo else "",
        parsed=form.parsed,
    )
    return Task([request], writer, _misspelt(body, asked, conventions))


def _misspelt(body: dict[str, Any], asked: ChatBody, conventions: Conventions) -> list[str]:
    found = [*_NAMES.misspelt(body), *misspelt(asked.messages)]
    own = conventions.chat_templates
    if asked.chat_template_kwargs and (asked.chat_template is None or asked.chat_template in own):
        variables = KnownNames(frozenset[str]().union(*own.values()))
        found += variables.misspelt(asked.chat_template_kwargs, "chat_template_kwargs")
    return found


def _prompt(asked: ChatBody, conventions: Conventions, tools: Tools | None) -> ChatPrompt:
    add, resume = asked.add_generation_prompt, bool(asked.continue_final_message)
    if add and resume:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other",
            param="continue_final_message",
        )
    template, own = asked.chat_template, conventions.chat_templates
    if template is not None and template not in own and not conventions.trust_chat_templates:
        names = f", by name: {', '.join(sorted(own)[:MOST_NAMES])}" if own else ""
        raise InvalidRequest(
            f"chat_template: this server uses its own templates{names} (option.trust_request_chat_template=true lets "
            "requests bring theirs)",
            param="chat_template",
        )
    variables = dict(asked.chat_template_kwargs or {})
    if asked.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", asked.reasoning_effort)
    if asked.documents is not None:
        variables.setdefault("documents", asked.documents)
    return ChatPrompt(
        messages=read_messages(
            asked.messages, embeddings=conventions.embeddings, context=conventions.max_model_len
        ),
        add_generation_prompt=not resume if add is None else add,
        continue_final_message=resume,
        template=template,
        template_kwargs=variables,
        tools=None if tools is None else tools.offered,
        add_special_tokens=asked.add_special_tokens,
    )


def _echo(prompt: ChatPrompt) -> str:
    """The text that the answer goes on from, where the last turn is the answer's own."""
    last = prompt.messages[-1]
    if last.role != "assistant" and prompt.add_generation_prompt:
        return ""
    return "".join(part.text for part in last.parts if isinstance(part, TextPart))


def _sampling(asked: ChatBody) -> dict[str, Any]:
    top = asked.top_logprobs
    if top is not None and top > 0 and not asked.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    if top is not None and not 0 <= top <= 20:
        raise InvalidRequest(f"top_logprobs is {shown(top)}; allowed: from 0 to 20", param="top_logprobs")
    values = common_sampling(asked)
    if asked.max_completion_tokens is not None:
        values["max_tokens"] = asked.max_completion_tokens
    values["logprobs"] = (top or 0) if asked.logprobs else None
    return values
