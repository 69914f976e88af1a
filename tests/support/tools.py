"""Chats with tools: what clients send, and what they read of the reply."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from handlers.deltas import Delta
from handlers.parsers.base import AnswerFormats
from handlers.parsers.select import answer_formats
from handlers.protocols.base import ServerContext
from handlers.protocols.openai.chat import read_chat
from handlers.request import GenerationRequest
from tests.support.scripted import ScriptedBackend, Step, chat, everything, incoming, service


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, **({} if parameters is None else {"parameters": parameters}), **more}
    return {"type": "function", "function": function}


DRAW = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "light blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
        "at": {"$ref": "#/$defs/point"},
        "inside": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["color", "count", "at"],
    "additionalProperties": False,
    "$defs": {
        "point": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2}
    },
}  # fmt: skip


TOOLS = [tool("draw", DRAW, description="Draws."), tool("now")]


HERMES = answer_formats("hermes", auto=True)


def read(body: dict[str, Any], formats: AnswerFormats = HERMES, **context: Any) -> GenerationRequest:
    task = read_chat(body, ServerContext("shapes", formats=formats, **context), incoming({}))
    return task.requests[0]


def answered(
    steps: list[Step], formats: AnswerFormats, body: dict[str, Any], *route: str, **headers: str
) -> tuple[int, bytes]:
    async def run() -> tuple[int, bytes]:
        backend = ScriptedBackend(steps, structured_outputs=True)
        reply = await service(backend, formats=formats).answer(incoming(body, *route, **headers))
        return reply.status, await everything(reply)

    return asyncio.run(run())


def whole(steps: list[Step], formats: AnswerFormats = HERMES, **fields: Any) -> ChatCompletion:
    status, reply = answered(steps, formats, chat(**fields))
    assert status == 200, reply
    completion = ChatCompletion.model_validate_json(reply, strict=True)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == sum(isinstance(step, Delta) for step in steps)
    return completion


def events(steps: list[Step], formats: AnswerFormats = HERMES, **fields: Any) -> list[dict[str, Any]]:
    status, reply = answered(steps, formats, chat(stream=True, **fields))
    assert status == 200, reply
    *lines, done = reply.decode().strip().split("\n\n")
    assert done == "data: [DONE]"
    found = [json.loads(line.removeprefix("data: ")) for line in lines]
    for event in found:
        ChatCompletionChunk.model_validate(event, strict=False)
    return found


def added_up(found: list[dict[str, Any]]) -> tuple[dict[str, Any], str | None]:
    """What a client makes of a stream's deltas: the message and the finish reason."""
    message: dict[str, Any] = {}
    reasons = []
    for event in found:
        for choice in event["choices"]:
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
            for key, value in choice["delta"].items():
                if key == "tool_calls":
                    calls = message.setdefault(key, [])
                    for part in value:
                        if part["index"] == len(calls):
                            assert set(part) == {"index", "id", "type", "function"}
                            assert part["function"]["arguments"] == ""
                            calls.append({**part, "function": dict(part["function"])})
                        else:
                            calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
                elif key == "function_call":
                    call = message.setdefault(key, {"arguments": ""})
                    call["arguments"] += value["arguments"]
                    call |= {"name": value["name"]} if "name" in value else {}
                elif value is None or key == "role":
                    message.setdefault(key, value)
                else:
                    message[key] = (message.get(key) or "") + value
    assert len(reasons) == 1
    return message, reasons[0]
