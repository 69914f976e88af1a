"""The API of tokens: TGI's `/tokenize` and `/chat_tokenize`, vLLM's `/tokenize` and `/detokenize`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from handlers.deltas import TokenizedPrompt
from handlers.errors import DeadlineExceeded, InvalidRequest
from handlers.protocols.base import JSON, Api, Route, ServerContext, Task, TokenCount, TokenId, in_thread_if
from handlers.protocols.body import convert
from handlers.protocols.known_names import KnownNames, warning
from handlers.protocols.lmi.replies import LmiError
from handlers.protocols.markdown_images import image_parts
from handlers.protocols.openai.bodies import ChatBody
from handlers.protocols.openai.chat import read_chat
from handlers.protocols.openai.replies import OPENAI_ERRORS, OpenAIError
from handlers.request import Incoming, Prompt, Reply, RequestFacts, TextPrompt, media_parts
from handlers.request_checks import longest_prompt

if TYPE_CHECKING:
    from handlers.service import Service

MOST_TOKENS = 2**20
"""The most tokens that are turned into text at once."""

MOST_TOKENIZED_BYTES = 2**20
"""The most bytes of a body, its images not counted, that are tokenised; never more than a prompt may have."""

LONG_TEXT_BYTES = 20_000
"""Longer texts are tokenised one at a time, which leaves the other threads to requests for answers."""

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class TokenTask:
    """What a body asks for.

    Attributes:
        write: Makes the reply's body.
        keep: How many of the last tokens are asked for; None for all of them.
        misspelt: Warnings, as in `Task`.
    """

    prompt: Prompt
    write: Callable[[TokenizedPrompt], bytes]
    keep: int | None = None
    misspelt: Sequence[str] = ()


class TokenParameters(msgspec.Struct):
    """TGI's parameters that affect tokens."""

    truncate: TokenCount | None = None


class InputsToTokens(msgspec.Struct):
    """A prompt in TGI's words."""

    inputs: str
    parameters: TokenParameters | None = None


class PromptToTokens(msgspec.Struct):
    """A prompt in vLLM's words."""

    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


_PROMPT_NAMES = KnownNames({*PromptToTokens.__struct_fields__}, {"model"})


class _VllmChat(msgspec.Struct):
    """Fields of `/tokenize` that a chat does not have; by default vLLM adds no special tokens to a chat."""

    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokensToText(msgspec.Struct):
    """Tokens whose text is wanted."""

    tokens: Annotated[list[TokenId], Meta(max_length=MOST_TOKENS)]


class SimpleToken(msgspec.Struct):
    """A token as TGI shows it; `start` and `stop` are in bytes of UTF-8, both 0 for a token added to the text."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokens(msgspec.Struct, forbid_unknown_fields=True):
    """TGI's reply to a chat; `templated_text` is the prompt that the chat template rendered."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class TokenCounts(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's reply; `token_strs` is null unless asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's reply: the text of tokens."""

    prompt: str


def read_tokenize(body: dict[str, Any], server: ServerContext, incoming: Incoming) -> TokenTask:
    """Read TGI's `inputs`, or vLLM's `prompt` or `messages`. Raises InvalidRequest naming the field."""
    if incoming.route == "/chat_tokenize":
        asked_chat = _chat(body, server, incoming)
        return TokenTask(asked_chat.requests[0].prompt, _chat_tokens, misspelt=asked_chat.misspelt)
    if "inputs" in body:
        asked = convert(body, InputsToTokens)
        keep = None if asked.parameters is None else asked.parameters.truncate
        return TokenTask(TextPrompt(image_parts(asked.inputs)), _tgi_tokens, keep)
    if "messages" in body:
        also = convert(body, _VllmChat)
        chat = {name: value for name, value in body.items() if name not in _VllmChat.__struct_fields__}
        if also.add_special_tokens:
            chat["add_special_tokens"] = True
        asked_chat = _chat(chat, server, incoming)
        write = _vllm_tokens(server, also.return_token_strs)
        return TokenTask(asked_chat.requests[0].prompt, write, misspelt=asked_chat.misspelt)
    if "prompt" in body:
        text = convert(body, PromptToTokens)
        add = True if text.add_special_tokens is None else text.add_special_tokens
        prompt = TextPrompt(image_parts(text.prompt), add_special_tokens=add)
        write = _vllm_tokens(server, text.return_token_strs)
        return TokenTask(prompt, write, misspelt=_PROMPT_NAMES.misspelt(body))
    raise InvalidRequest("the body has neither inputs, prompt nor messages", param="prompt")


def _chat(body: dict[str, Any], server: ServerContext, incoming: Incoming) -> Task:
    """Read a chat, to the same prompt that would be answered."""
    asked = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    return read_chat(asked, server, incoming)


async def _tokenize(service: Service, incoming: Incoming) -> Reply:
    return await service.reply(incoming, partial(_tokens, service))


async def _tokens(service: Service, body: dict[str, Any], incoming: Incoming, facts: RequestFacts, long: bool) -> Reply:
    """Answer with the tokens of a prompt. long: reading the body takes long."""
    task = await in_thread_if(long, read_tokenize, body, service.context, incoming)
    parts = list(media_parts(task.prompt))
    service.check_images(len(parts))
    size = max(0, incoming.size - sum(part.characters for part in parts))
    most = min(MOST_TOKENIZED_BYTES, longest_prompt(service.pipeline.capabilities.max_model_len))
    if size > most:
        raise InvalidRequest(f"the text is too long to be tokenised at once: {size} bytes; allowed: {most}")
    deadline = time.monotonic() + service.settings.predict_timeout
    incoming.parsed()
    try:
        async with _place(service):
            if parts:
                await service.images.load(parts, deadline)
            async with service.long_texts if size > LONG_TEXT_BYTES else nullcontext():
                found = await service.pipeline.tokenize(task.prompt)
                written = await in_thread_if(len(found.token_ids) > LONG_TEXT_BYTES // 8, _written, task, found)
    finally:
        for part in parts:
            part.release()
    return _noted(Reply(200, JSON, written, headers=warning(task.misspelt)), facts)


async def _detokenize(service: Service, incoming: Incoming) -> Reply:
    return await service.reply(incoming, partial(_text, service))


async def _text(service: Service, body: dict[str, Any], incoming: Incoming, facts: RequestFacts, long: bool) -> Reply:
    """Answer with the text of tokens. long: reading the body takes long."""
    asked = await in_thread_if(long, convert, body, TokensToText)
    incoming.parsed()
    async with _place(service), service.long_texts if incoming.size > LONG_TEXT_BYTES else nullcontext():
        reply = Detokenized(await service.pipeline.detokenize(asked.tokens))
    written = await in_thread_if(len(reply.prompt) > MOST_TOKENIZED_BYTES, _encode, reply)
    return _noted(Reply(200, JSON, written), facts)


@asynccontextmanager
async def _place(service: Service) -> AsyncIterator[None]:
    """Hold a place in the queue, for as long as the request may take."""
    permit = service.admission.admit(1)
    try:
        async with asyncio.timeout(service.settings.predict_timeout) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded() from error
    finally:
        permit.release()


def _noted(reply: Reply, facts: RequestFacts) -> Reply:
    facts.status, facts.total = reply.status, time.monotonic() - facts.arrival
    reply.facts = facts
    return reply


def _written(task: TokenTask, found: TokenizedPrompt) -> bytes:
    if task.keep is not None:
        keep = slice(max(0, len(found.token_ids) - task.keep), None)
        found = replace(found, token_ids=found.token_ids[keep], pieces=found.pieces[keep], spans=found.spans[keep])
    return task.write(found)


def _tgi_tokens(found: TokenizedPrompt) -> bytes:
    """Encode the tokens in pieces, so that other threads can run in between."""
    tokens = _simple_tokens(found)
    pieces = [_encode(tokens[at : at + 4096])[1:-1] for at in range(0, len(tokens), 4096)]
    return b"[" + b",".join(pieces) + b"]"


def _chat_tokens(found: TokenizedPrompt) -> bytes:
    text = _encode(found.text)
    return b'{"tokenize_response":' + _tgi_tokens(found) + b',"templated_text":' + text + b"}"


def _simple_tokens(found: TokenizedPrompt) -> list[SimpleToken]:
    at = None if found.text.isascii() else [0, *accumulate(len(c.encode()) for c in found.text)]
    return [
        SimpleToken(token_id, found.text[start:stop], *((start, stop) if at is None else (at[start], at[stop])))
        for token_id, (start, stop) in zip(found.token_ids, found.spans, strict=True)
    ]


def _vllm_tokens(server: ServerContext, pieces: bool | None) -> Callable[[TokenizedPrompt], bytes]:
    def write(found: TokenizedPrompt) -> bytes:
        strings = list(found.pieces) if pieces else None
        return _encode(TokenCounts(len(found.token_ids), server.max_model_len, found.token_ids, strings))

    return write


ROUTES = (
    Route(
        "/chat_tokenize", "tokenize", "Tokens of a chat (TGI)", queued=True, bodies=(ChatBody,), replies=(ChatTokens,)
    ),
    Route(
        "/tokenize",
        "tokenize",
        "Tokens of a text or of a chat, as TGI (inputs) or vLLM (prompt, messages) counts them",
        queued=True,
        bodies=(InputsToTokens, PromptToTokens, ChatBody),
        replies=(list[SimpleToken], TokenCounts),
        errors=(OpenAIError, LmiError),
    ),
    Route(
        "/detokenize",
        "detokenize",
        "Text of tokens (vLLM)",
        queued=True,
        bodies=(TokensToText,),
        replies=(Detokenized,),
        errors=(OpenAIError, LmiError),
    ),
)

TOKENS = Api(
    OPENAI_ERRORS,
    claims=lambda route, headers, keys: False,
    routes=ROUTES,
    calls={"tokenize": _tokenize, "detokenize": _detokenize},
)
