"""Ask a server in every way that TGI's own `text-generation` package has, and print what it said as JSON.

    ask_text_generation.py URL IMAGES

The package holds every reply to its pydantic types. Its stream of a chat is left out: it demands a field that TGI
does not send either.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError
from text_generation.types import Message

URL, IMAGES = sys.argv[1], Path(sys.argv[2])


def prompt(name: str) -> str:
    data = base64.b64encode((IMAGES / f"{name}.png").read_bytes()).decode()
    return f"![](data:image/png;base64,{data})What is in this image?\n\n"


def told(response: Any) -> list[Any]:
    details = response.details
    return [
        response.generated_text,
        details.finish_reason.value,
        details.generated_tokens == len(details.tokens),
    ]


def at_once() -> dict[str, Any]:
    client = Client(URL, timeout=60)
    said: dict[str, Any] = {"generate": told(client.generate(prompt("red-circle"), max_new_tokens=20))}
    more = client.generate(
        prompt("red-circle"),
        max_new_tokens=9,
        best_of=2,
        do_sample=True,
        decoder_input_details=True,
        top_n_tokens=2,
    )
    said["best_of"] = [len(more.details.best_of_sequences), len(more.details.top_tokens[0]) >= 2]
    said["stop"] = client.generate(prompt("red-circle"), stop_sequences=[" circle"]).generated_text
    pieces = list(client.generate_stream(prompt("yellow-star"), max_new_tokens=20))
    said["stream"] = "".join(piece.token.text for piece in pieces if not piece.token.special)
    said["stream end"] = [pieces[-1].generated_text, pieces[-1].details.finish_reason.value]
    try:
        client.generate("hi", max_new_tokens=10**9)
    except ValidationError as error:
        said["refused"] = str(error).partition(":")[0]
    reply = client.chat([Message(role="user", content="Hello!")], max_tokens=20, temperature=0.01, seed=1)
    said["chat"] = reply.choices[0].message.content
    return said


async def asynchronously() -> dict[str, Any]:
    client = AsyncClient(URL, timeout=60)
    replies = await asyncio.gather(
        *(client.generate(prompt(name), max_new_tokens=20) for name in ("red-circle", "green-triangle"))
    )
    stream = client.generate_stream(prompt("yellow-star"), max_new_tokens=20)
    pieces = [piece.token.text async for piece in stream if not piece.token.special]
    return {"async": [told(reply) for reply in replies], "async stream": "".join(pieces)}


if __name__ == "__main__":
    print(json.dumps({"version": version("text-generation")} | at_once() | asyncio.run(asynchronously())))
