"""Ask a server in every way that the `openai` package has, and print what it said as JSON:  ask_openai.py URL IMAGES

Runs with the current major of the package and with an older one. Every reply is read once more, strictly, as the
type that the package publishes for it: the package itself takes anything.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

import openai
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

URL, IMAGES = sys.argv[1], Path(sys.argv[2])
OPTIONS: dict[str, Any] = {"base_url": f"{URL}/v1", "api_key": "unused", "max_retries": 0, "timeout": 60}
WHAT = "What is in this image?"


class Shape(BaseModel):
    color: str
    shape: str


class Shapes(BaseModel):
    shapes: list[Shape]


def image(name: str) -> dict[str, Any]:
    path = next(IMAGES.glob(f"{name}.*"))
    kind = "png" if path.suffix == ".png" else "jpeg"
    url = f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def asking(question: str, *names: str, **more: Any) -> dict[str, Any]:
    content = [*map(image, names), {"type": "text", "text": question}]
    return {"model": "shapes", "messages": [{"role": "user", "content": content}], "temperature": 0, **more}


def checked(shape: type[BaseModel], reply: Any) -> Any:
    """The reply, once its bytes have been read as what is published."""
    shape.model_validate_json(reply.text, strict=True)
    return reply.parse()


TOOL = {
    "type": "function",
    "function": {
        "name": "report",
        "description": "Report the shapes.",
        "parameters": Shapes.model_json_schema(),
    },
}


def plain(client: openai.OpenAI) -> dict[str, Any]:
    raw = client.chat.completions.with_raw_response
    said: dict[str, Any] = {}
    reply = checked(ChatCompletion, raw.create(**asking(WHAT, "red-circle")))
    said["chat"] = reply.choices[0].message.content
    said["finish"] = reply.choices[0].finish_reason
    said["usage adds up"] = reply.usage.prompt_tokens + reply.usage.completion_tokens == reply.usage.total_tokens
    two = asking("What is in these images?", "green-triangle", "yellow-star")
    said["two images"] = checked(ChatCompletion, raw.create(**two)).choices[0].message.content
    reply = checked(ChatCompletion, raw.create(**asking(WHAT, "red-circle", n=2, logprobs=True, top_logprobs=2)))
    said["n"] = [choice.message.content for choice in reply.choices]
    said["logprobs"] = "".join(entry.token for entry in reply.choices[0].logprobs.content)
    said["stop"] = (
        checked(ChatCompletion, raw.create(**asking(WHAT, "red-circle", stop=" circle", max_completion_tokens=20)))
        .choices[0]
        .message.content
    )
    prompt = f"![]({image('red-circle')['image_url']['url']})What is in this image?"
    reply = client.completions.with_raw_response.create(model="shapes", prompt=prompt, temperature=0)
    said["completion"] = checked(Completion, reply).choices[0].text
    said["models"] = [model.id for model in client.models.list()]
    said["model"] = checked(Model, client.models.with_raw_response.retrieve("shapes")).id
    return said


def streamed(client: openai.OpenAI) -> dict[str, Any]:
    said: dict[str, Any] = {}
    texts, usage, roles, finish = [], None, [], []
    ask = asking(WHAT, "orange-star-and-blue-square", stream=True, stream_options={"include_usage": True})
    for chunk in client.chat.completions.create(**ask):
        ChatCompletionChunk.model_validate_json(chunk.model_dump_json(exclude_unset=True), strict=True)
        for choice in chunk.choices:
            texts.append(choice.delta.content or "")
            roles += [choice.delta.role] * (choice.delta.role is not None)
            finish += [choice.finish_reason] * (choice.finish_reason is not None)
        usage = chunk.usage or usage
    said["stream"] = "".join(texts)
    said["stream pieces"] = len([text for text in texts if text]) > 1
    said["stream roles"], said["stream finish"] = roles, finish
    said["stream usage"] = usage is not None and usage.completion_tokens > 3
    prompt = f"![]({image('yellow-star')['image_url']['url']})What is in this image?"
    pieces = client.completions.create(model="shapes", prompt=prompt, temperature=0, stream=True)
    said["completion stream"] = "".join(piece.choices[0].text for piece in pieces)
    return said


def structured(client: openai.OpenAI) -> dict[str, Any]:
    said: dict[str, Any] = {}
    chat = client.chat.completions if hasattr(client.chat.completions, "parse") else client.beta.chat.completions
    reply = chat.parse(**asking("Answer in JSON.", "orange-star-and-blue-square"), response_format=Shapes)
    parsed = reply.choices[0].message.parsed
    said["parse"] = [f"{shape.color} {shape.shape}" for shape in parsed.shapes] if parsed else None
    ask = asking("Answer in JSON.", "red-circle", response_format={"type": "json_object"})
    reply = checked(ChatCompletion, client.chat.completions.with_raw_response.create(**ask))
    said["json"] = json.loads(reply.choices[0].message.content)
    forced = {"type": "function", "function": {"name": "report"}}
    ask = asking("What is in this image? Answer in JSON.", "red-circle", tools=[TOOL], tool_choice=forced)
    reply = checked(ChatCompletion, client.chat.completions.with_raw_response.create(**ask))
    call = reply.choices[0].message.tool_calls[0].function
    said["tool"] = [call.name, json.loads(call.arguments)]
    names, arguments = [], []
    for chunk in client.chat.completions.create(**ask, stream=True):
        ChatCompletionChunk.model_validate_json(chunk.model_dump_json(exclude_unset=True), strict=True)
        for choice in chunk.choices:
            for piece in choice.delta.tool_calls or ():
                names += [piece.function.name] * bool(piece.function.name)
                arguments.append(piece.function.arguments or "")
    said["tool stream"] = [*names, json.loads("".join(arguments))]
    return said


def errors(client: openai.OpenAI) -> dict[str, Any]:
    said: dict[str, Any] = {}
    wrong = asking("hi", temperature=0)
    wrong["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}})
    formats = {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}
    for name, ask in (
        ("bad image", wrong),
        ("bad stream", {**wrong, "stream": True}),
        ("bad value", asking("hi", top_p=7)),
        ("bad schema", asking("hi", response_format=formats)),
    ):
        try:
            client.chat.completions.create(**ask)
        except openai.APIStatusError as error:
            said[name] = [type(error).__name__, error.status_code, error.param]
    return said


async def at_once() -> dict[str, Any]:
    async with openai.AsyncOpenAI(**OPTIONS) as client:
        names = ["red-circle", "green-triangle", "yellow-star", "black-cross"]
        replies = await asyncio.gather(*(client.chat.completions.create(**asking(WHAT, name)) for name in names))
        stream = await client.chat.completions.create(**asking(WHAT, "black-cross", stream=True))
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return {
            "async": [reply.choices[0].message.content for reply in replies],
            "async stream": "".join(pieces),
        }


def main() -> None:
    said: dict[str, Any] = {"version": openai.__version__}
    with openai.OpenAI(**OPTIONS) as client:
        for way in (plain, streamed, structured, errors):
            said |= way(client)
    said |= asyncio.run(at_once())
    print(json.dumps(said))


if __name__ == "__main__":
    main()
