"""Ask a server in every way that `huggingface_hub.InferenceClient` has, and print what it said as JSON.

    ask_hub.py URL IMAGES

Runs with the current major of the package and with the last before 1.0. What comes back is compared with the
package's own types: those hold whatever was sent, so each must have no field that they do not know and lack none.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import sys
import types
import typing
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import (
    AsyncInferenceClient,
    ChatCompletionOutput,
    ChatCompletionStreamOutput,
    InferenceClient,
    TextGenerationOutput,
    TextGenerationStreamOutput,
)
from huggingface_hub.errors import HTTPError, ValidationError

URL, IMAGES = sys.argv[1], Path(sys.argv[2])
WHAT = "What is in this image?"


def data_url(name: str) -> str:
    path = next(IMAGES.glob(f"{name}.*"))
    kind = "png" if path.suffix == ".png" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def check(value: Any, kind: Any, at: str = "reply") -> None:
    """Hold a value to a dataclass's fields and their types, and those within them."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        some = typing.get_args(kind)
        if value is None:
            assert type(None) in some, f"{at} is None, not {kind}"
            return
        kind = next((one for one in some if dataclasses.is_dataclass(one)), None) or next(
            one for one in some if one is not type(None)
        )
        return check(value, kind, at)
    if origin is list:
        assert isinstance(value, list), f"{at} is no list"
        for index, one in enumerate(value):
            check(one, typing.get_args(kind)[0], f"{at}[{index}]")
    elif origin is typing.Literal:
        assert value in typing.get_args(kind), f"{at} is {value!r}, not one of {typing.get_args(kind)}"
    elif dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            check(getattr(value, field.name), hints[field.name], f"{at}.{field.name}")
    elif at.endswith(".delta.role"):
        assert value in (None, "assistant"), "in the first piece of a stream alone, as OpenAI has it"
    elif kind in (str, int, bool):
        assert type(value) is kind, f"{at} is {value!r}, no {kind.__name__}"
    elif kind is float and at.endswith("prefill[0].logprob"):
        assert value is None, "the first token has none, whatever the type says"
    elif kind is float:
        assert type(value) in (int, float), f"{at} is {value!r}, no number"


def text(client: InferenceClient) -> dict[str, Any]:
    said: dict[str, Any] = {}
    prompt = f"![]({data_url('red-circle')})What is in this image?\n\n"
    said["text"] = client.text_generation(prompt, max_new_tokens=20)
    whole = client.text_generation(prompt, max_new_tokens=20, details=True, decoder_input_details=True)
    check(whole, TextGenerationOutput)
    said["details"] = [
        whole.generated_text,
        whole.details.finish_reason,
        whole.details.generated_tokens == len(whole.details.tokens),
        "".join(token.text for token in whole.details.tokens if not token.special),
        len(whole.details.prefill) > 5,
    ]
    said["stream"] = "".join(
        piece for piece in client.text_generation(prompt, max_new_tokens=20, stream=True) if piece != "</s>"
    )
    events = list(client.text_generation(prompt, max_new_tokens=20, stream=True, details=True))
    for event in events:
        check(event, TextGenerationStreamOutput)
    said["stream details"] = [
        events[-1].generated_text,
        events[-1].details.finish_reason,
        events[-1].details.generated_tokens == len(events),
        [event.index for event in events] == list(range(1, len(events) + 1)),
    ]
    said["stop"] = client.text_generation(prompt, max_new_tokens=20, stop=[" circle"])
    said["full text"] = client.text_generation("Hello", max_new_tokens=1, return_full_text=True).startswith("Hello")
    best = client.text_generation(prompt, max_new_tokens=9, do_sample=True, best_of=2, details=True)
    check(best, TextGenerationOutput)
    said["best_of"] = len(best.details.best_of_sequences)
    color = {"color": {"enum": ["red", "blue"]}}
    shape = {"type": "object", "properties": color, "required": ["color"], "additionalProperties": False}
    grammar = {"type": "json", "value": shape}
    asked = f"![]({data_url('red-circle')})What color is the circle? Answer in JSON."
    said["grammar"] = json.loads(client.text_generation(asked, max_new_tokens=30, grammar=grammar))
    try:
        client.text_generation("hi", max_new_tokens=20, top_p=7.0)
    except ValidationError as error:
        said["refused"] = str(error).partition(":")[0]
    return said


def chat(client: InferenceClient) -> dict[str, Any]:
    said: dict[str, Any] = {}
    content = [
        {"type": "image_url", "image_url": {"url": data_url("yellow-star")}},
        {"type": "text", "text": WHAT},
    ]
    messages = [{"role": "user", "content": content}]
    reply = client.chat_completion(messages, max_tokens=20, temperature=0)
    check(reply, ChatCompletionOutput)
    said["chat"] = [reply.choices[0].message.content, reply.choices[0].finish_reason]
    pieces = list(client.chat_completion(messages, max_tokens=20, temperature=0, stream=True))
    for piece in pieces:
        check(piece, ChatCompletionStreamOutput)
    said["chat stream"] = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    said["create"] = (
        client.chat.completions.create(model="tgi", messages=messages, max_tokens=20, temperature=0)
        .choices[0]
        .message.content
    )
    shapes = {"shapes": {"type": "array", "items": {"type": "object"}}}
    schema = {"type": "object", "properties": shapes, "required": ["shapes"]}
    formats = {"type": "json_schema", "json_schema": {"name": "shapes", "schema": schema, "strict": True}}
    content[1]["text"] = "Answer in JSON."
    reply = client.chat_completion(messages, max_tokens=60, temperature=0, response_format=formats)
    said["json"] = json.loads(reply.choices[0].message.content)
    try:
        client.chat_completion(messages, max_tokens=20, top_p=7.0)
    except HTTPError as error:
        said["refused chat"] = error.response.status_code
    return said


async def at_once() -> list[str]:
    prompt = f"![]({data_url('black-cross')})What is in this image?\n\n"
    client = AsyncInferenceClient(URL, token="unused", timeout=60)
    texts = await asyncio.gather(*(client.text_generation(prompt, max_new_tokens=20) for _ in range(3)))
    stream = await client.text_generation(prompt, max_new_tokens=20, stream=True)
    return [*texts, "".join([piece async for piece in stream if piece != "</s>"])]


def main() -> None:
    said: dict[str, Any] = {"version": huggingface_hub.__version__}
    said["text"] = text(InferenceClient(URL, token="unused", timeout=60))
    for base in (URL, f"{URL}/v1", f"{URL}/invocations"):
        said[f"chat at {base.removeprefix(URL) or '/'}"] = chat(
            InferenceClient(base_url=base, token="unused", timeout=60)
        )
    said["async"] = asyncio.run(at_once())
    print(json.dumps(said))


if __name__ == "__main__":
    main()
