"""Reads the body of a chat completion."""

from __future__ import annotations

from typing import Any

import msgspec

from engine.sampling_params import shown
from handlers.errors import InvalidParameter, InvalidRequest
from handlers.protocols.base import ServerContext, Task
from handlers.protocols.body import convert
from handlers.protocols.constraints import read_constraint
from handlers.protocols.known_names import KnownNames
from handlers.protocols.openai.answer_form import answer_form
from handlers.protocols.openai.bodies import (
    ChatBody,
    check_stream,
    common_sampling,
    count_answers,
    generation_request,
    known_names,
    refuse_unsupported,
    reply_options,
)
from handlers.protocols.openai.chat_writer import ChatWriter
from handlers.protocols.openai.messages import misspelt, read_messages
from handlers.protocols.openai.tools import Tools, read_tools
from handlers.protocols.sampler_fields import sampler_names, sampling_params
from handlers.request import ChatPrompt, Incoming, TextPart

MOST_NAMES = 8
"""The most names of templates that an error lists."""

_NAMES = known_names(ChatBody)


def read_chat(body: dict[str, Any], server: ServerContext, incoming: Incoming, adapter: str | None = None) -> Task:
    """See `Reader`."""
    refuse_unsupported(body, ChatBody)
    asked = convert(body, ChatBody)
    if asked.modalities is not None and asked.modalities != ["text"]:
        raise InvalidRequest('modalities: this server answers with ["text"] only', param="modalities")
    tools = read_tools(asked, server.formats)
    check_stream(asked)
    n = count_answers(asked)
    names = sampler_names(asked)
    if asked.max_completion_tokens is not None:
        asked.max_tokens, names["max_tokens"] = asked.max_completion_tokens, "max_completion_tokens"
    prompt = _prompt(asked, server, tools)
    constraint = read_constraint(
        response_format=asked.response_format, structured_outputs=asked.structured_outputs, guided=body
    )
    sampling = sampling_params(_sampling(asked), server.sampling, names)
    hide = asked.include_reasoning is False
    form = answer_form(tools, constraint, server, prompt.template_kwargs, hide_reasoning=hide)
    if form.keeps_special_tokens and sampling.skip_special_tokens:
        sampling = msgspec.structs.replace(sampling, skip_special_tokens=False)
    request_id = incoming.request_id
    request = generation_request(asked, request_id, prompt, sampling, n=n, adapter=adapter, constraint=form.constraint)
    reply_id = f"chatcmpl-{asked.request_id or request_id}"
    writer = ChatWriter(
        reply_options(asked, reply_id, server.model_name, hide_tokens=form.hides_tokens),
        top_logprobs=(asked.top_logprobs or 0) if asked.logprobs and not form.hides_tokens else None,
        prompt_text=bool(asked.return_prompt_text),
        echo=_echo(prompt) if asked.echo else "",
        parsed=form.parsed,
    )
    return Task([request], writer, _misspelt(body, asked, server), names)


def _misspelt(body: dict[str, Any], asked: ChatBody, server: ServerContext) -> list[str]:
    found = [*_NAMES.misspelt(body), *misspelt(asked.messages)]
    own = server.chat_templates
    if asked.chat_template_kwargs and (asked.chat_template is None or asked.chat_template in own):
        variables = KnownNames(frozenset[str]().union(*own.values()))
        found += variables.misspelt(asked.chat_template_kwargs, "chat_template_kwargs")
    return found


def _prompt(asked: ChatBody, server: ServerContext, tools: Tools | None) -> ChatPrompt:
    add, resume = asked.add_generation_prompt, bool(asked.continue_final_message)
    if add and resume:
        raise InvalidParameter("continue_final_message", "and add_generation_prompt exclude each other")
    template, own = asked.chat_template, server.chat_templates
    if template is not None and template not in own and not server.trust_chat_templates:
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
        messages=read_messages(asked.messages, embeddings=server.embeddings, context=server.max_model_len),
        add_generation_prompt=not resume if add is None else add,
        continue_final_message=resume,
        template=template,
        template_kwargs=variables,
        tools=None if tools is None else tools.offered,
        add_special_tokens=asked.add_special_tokens,
    )


def _echo(prompt: ChatPrompt) -> str:
    """Return the text that the answer continues, if the last turn is the assistant's."""
    last = prompt.messages[-1]
    if last.role != "assistant" and prompt.add_generation_prompt:
        return ""
    return "".join(part.text for part in last.parts if isinstance(part, TextPart))


def _sampling(asked: ChatBody) -> dict[str, Any]:
    """Return fields of RequestSampling, None for what was not given. Raises InvalidRequest."""
    top = asked.top_logprobs
    if top is not None and top > 0 and not asked.logprobs:
        raise InvalidParameter("top_logprobs", "needs logprobs: true")
    if top is not None and not 0 <= top <= 20:
        raise InvalidParameter("top_logprobs", f"is {shown(top)}; allowed: from 0 to 20")
    return common_sampling(asked) | {"logprobs": (top or 0) if asked.logprobs else None}
