"""Bodies that cost more than they look: each a few megabytes, none of them useful."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

CHAT, COMPLETIONS, LMI, TGI = "/v1/chat/completions", "/v1/completions", "/invocations", "/generate"
_HELLO = '"messages":[{"role":"user","content":"hi"}]'


class Payload(NamedTuple):
    name: str
    path: str
    body: bytes
    content_type: str = "application/json"


def _many(item: str, count: int, opening: str = "[", closing: str = "]") -> str:
    return opening + ",".join([item] * count) + closing


def _keys(count: int, value: str = "1") -> str:
    return ",".join(f'"k{number}":{value}' for number in range(count))


def _image(url: str) -> bytes:
    part = f'{{"type":"image_url","image_url":{{"url":"{url}"}}}}'
    return f'{{"messages":[{{"role":"user","content":[{part}]}}],"max_tokens":2}}'.encode()


def _texts() -> Iterator[tuple[str, str, str]]:
    """JSON bodies that are text."""
    million = 1_000_000
    yield "unknown keys", COMPLETIONS, '{"prompt":"a","max_tokens":2,' + _keys(450_000) + "}"
    yield "unknown keys of a chat", CHAT, _chat(_keys(450_000))
    yield "one key, repeated", CHAT, _chat(_many('"a":1', 800_000, "", ""))
    yield "keys of an object that nobody reads", CHAT, _chat('"metadata":{' + _keys(400_000) + "}")
    yield "keys of a message", CHAT, '{"messages":[{"role":"user","content":"a",' + _keys(400_000) + "}]}"
    yield "token ids", COMPLETIONS, '{"prompt":' + _many("7", 2_500_000) + "}"
    yield "prompts", COMPLETIONS, '{"prompt":' + _many('"a"', 1_200_000) + "}"
    yield "prompts of token ids", COMPLETIONS, '{"prompt":' + _many("[7]", 1_200_000) + "}"
    yield "messages", CHAT, '{"messages":' + _many('{"role":"user","content":"a"}', 150_000) + "}"
    yield "parts", CHAT, _says(_many('{"type":"text","text":"a"}', 200_000))
    yield "stop strings", CHAT, _chat('"stop":' + _many('"a"', 1_200_000))
    yield "stop ids", CHAT, _chat('"stop_token_ids":' + _many("5", 2_500_000))
    yield (
        "biases",
        CHAT,
        _chat('"logit_bias":{' + ",".join(f'"{number}":1' for number in range(450_000)) + "}"),
    )
    yield "tools", CHAT, _chat('"tools":' + _many('{"type":"function","function":{"name":"f"}}', 100_000))
    yield "documents", CHAT, _chat('"documents":' + _many('{"text":"a"}', 350_000))
    yield "template arguments", CHAT, _chat('"chat_template_kwargs":{' + _keys(400_000) + "}")
    yield "brackets", CHAT, _chat('"x":' + "[" * 2_000_000 + "]" * 2_000_000)
    yield "empty lists", CHAT, _chat('"x":' + _many("[]", million))
    yield "empty objects", CHAT, _chat('"x":' + _many("{}", million))
    yield "digits of a number", CHAT, _chat('"seed":' + "9" * 4_000_000)
    yield "digits behind a point", CHAT, _chat('"temperature":0.' + "9" * 4_000_000)
    yield "escapes", CHAT, _says('"' + "\\u0041" * 800_000 + '"')
    yield "a long text", CHAT, _says('"' + "word " * million + '"')
    yield "a long text of wide characters", CHAT, _says('"' + "\U0001f600" * 1_200_000 + '"')
    yield "a long key", CHAT, _chat('"' + "k" * 5_000_000 + '":1')
    yield "a long role", CHAT, '{"messages":[{"role":"' + "r" * 5_000_000 + '","content":"a"}]}'
    yield "white space", CHAT, "{" + " " * 6_000_000 + _HELLO + "}"
    yield "damaged at its end", CHAT, "{" + _HELLO + ',"x":' + _many("1", 2_000_000)
    yield "images in Markdown", LMI, json.dumps({"inputs": "![](data:,)" * 400_000})
    yield "brackets in Markdown", LMI, json.dumps({"inputs": "![" * 2_000_000})
    yield "half images in Markdown", LMI, json.dumps({"inputs": "![](" * million})
    yield "inputs", LMI, '{"inputs":' + _many('"a"', 1_200_000) + "}"
    yield (
        "stop sequences",
        LMI,
        '{"inputs":"a","parameters":{"stop_sequences":' + _many('"a"', 1_200_000) + "}}",
    )
    yield "unknown parameters", TGI, '{"inputs":"a","parameters":{"max_new_tokens":2,' + _keys(400_000) + "}}"
    yield "ids to detokenize", "/detokenize", '{"tokens":' + _many("7", 2_500_000) + "}"
    yield "a text to tokenize", "/tokenize", json.dumps({"prompt": "word " * million})
    yield (
        "properties of a schema",
        CHAT,
        _answer('{"type":"object","properties":{' + _keys(250_000, "{}") + "}}"),
    )
    yield "values of a schema", CHAT, _answer('{"enum":' + _many('"a"', million) + "}")
    yield "alternatives in a schema", CHAT, _answer('{"anyOf":' + _many("{}", million) + "}")
    yield "a long pattern", CHAT, _answer('{"type":"string","pattern":"' + "(a|b)" * 800_000 + '"}')
    yield "choices", CHAT, _chat('"structured_outputs":{"choice":' + _many('"a"', million) + "}")


def _chat(fields: str) -> str:
    return '{"max_tokens":2,' + _HELLO + "," + fields + "}"


def _says(content: str) -> str:
    return '{"max_tokens":2,"messages":[{"role":"user","content":' + content + "}]}"


def _answer(schema: str) -> str:
    form = '{"type":"json_schema","json_schema":{"name":"a","schema":' + schema + "}}"
    return _chat(f'"response_format":{form}')


def payloads() -> Iterator[Payload]:
    """Made one at a time, since they are large."""
    for name, path, text in _texts():
        yield Payload(name, path, text.encode())
    yield Payload("invalid UTF-8", CHAT, b'{"x":"' + b"\xff" * 5_000_000 + b'"}')
    yield Payload("a text body", LMI, b"a" * 5_000_000, "text/plain")
    yield Payload("a form", LMI, b"{" + b"a=b&" * 1_000_000, "application/x-www-form-urlencoded")
    yield Payload("zero bytes", CHAT, bytes(5_000_000))
    yield Payload("a percent-encoded data URL", CHAT, _image("data:image/png," + "%41" * 1_600_000))
    yield Payload("percent-encoded base64", CHAT, _image("data:image/png;base64," + "%41" * 1_600_000))
    yield Payload("base64 with line breaks", CHAT, _image("data:image/png;base64," + "QUFB\\n" * 800_000))
    yield Payload("base64 with escapes", CHAT, _image("data:image/png;base64," + "\\u0041" * 800_000))
    yield Payload("base64 without end", CHAT, _image("data:image/png;base64," + "A" * 5_000_001))
    yield Payload("no base64", CHAT, _image("data:image/png;base64," + "?" * 5_000_000))
    yield Payload("base64 with wide characters", CHAT, _image("data:image/png;base64," + "é" * 2_500_000))
    yield Payload("a data URL's parameters", CHAT, _image("data:image/png" + ";a" * 2_500_000 + ",A"))
    yield Payload("a URL", CHAT, _image("http://127.0.0.1/" + "a" * 5_000_000))
    yield Payload("a URL of dots", CHAT, _image("http://" + "a." * 2_500_000 + "/"))
    yield Payload("white space around a URL", CHAT, _image(" " * 5_000_000 + "data:,"))
