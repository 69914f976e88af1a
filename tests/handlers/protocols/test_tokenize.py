"""/tokenize, /chat_tokenize, /detokenize and /info: true counts, in TGI's and in vLLM's words."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from handlers.deltas import TokenizedPrompt
from handlers.prompts.renderer import PromptRenderer
from handlers.request import Prompt, Reply, TextPart, TextPrompt
from tests.support.backend import VLLM
from tests.support.live import LiveServer, data_url
from tests.support.scripted import ScriptedBackend, ScriptedImages, everything, incoming, service
from tests.support.shapes import SHAPES

TOKENIZER = Tokenizer.from_file(str(SHAPES / "tokenizer.json"))
IMAGE_TOKENS = 64
TEXTS = [
    "What is this?",
    "  spaces \n\n and\ttabs ",
    "Grüße, 世界 🌍👩‍👩‍👧 é",
    "literal <image> and <imag",
    "<|user|>hi</s>",
    "x" * 3000,
]


@pytest.fixture(scope="module")
def server(shapes_server: LiveServer) -> LiveServer:
    return shapes_server


def image() -> str:
    return data_url(Image.new("RGB", (40, 30), "red"))


def chat(*texts: str, images: int = 0, **fields: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": image()}}] * images
    parts += [{"type": "text", "text": text} for text in texts]
    return {"messages": [{"role": "user", "content": parts}], **fields}


def ask(server: LiveServer, path: str, body: Any) -> Any:
    reply = server.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("text", TEXTS)
def test_tgis_tokens_cover_the_text_in_bytes(server: LiveServer, text: str) -> None:
    tokens = ask(server, "/tokenize", {"inputs": text})
    data = text.encode()
    end = 0
    for token in tokens:
        assert list(token) == ["id", "text", "start", "stop"]
        assert data[token["start"] : token["stop"]].decode() == token["text"]
        assert token["start"] <= end
        end = max(end, token["stop"])
    assert end == len(data)
    if "<imag" not in text:
        assert [token["id"] for token in tokens] == TOKENIZER.encode(text).ids
    else:
        assert 3 not in [token["id"] for token in tokens]


@pytest.mark.parametrize("text", TEXTS)
def test_vllms_tokens_are_those_of_a_completion(server: LiveServer, text: str) -> None:
    found = ask(server, "/tokenize", {"model": "x", "prompt": text, "return_token_strs": True})
    assert list(found) == ["count", "max_model_len", "tokens", "token_strs"]
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 4096
    assert found["token_strs"] == [TOKENIZER.id_to_token(token) for token in found["tokens"]]
    usage = ask(server, "/v1/completions", {"prompt": text, "max_tokens": 1})["usage"]
    assert usage["prompt_tokens"] == found["count"]
    assert ask(server, "/detokenize", {"model": "x", "tokens": found["tokens"]}) == {"prompt": text}
    assert ask(server, "/tokenize", {"prompt": text})["token_strs"] is None


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("text", TEXTS[:5])
def test_a_chats_tokens_are_those_it_is_answered_for(server: LiveServer, text: str, images: int) -> None:
    body = chat(text, images=images)
    found = ask(server, "/tokenize", body)
    usage = ask(server, "/v1/chat/completions", {**body, "max_tokens": 1})["usage"]
    assert found["count"] == usage["prompt_tokens"]
    assert found["tokens"].count(3) == IMAGE_TOKENS * images
    shown = ask(server, "/chat_tokenize", body)
    templated = "<s><|user|>" + "<image>" * images + text + "</s><|assistant|>"
    assert shown["templated_text"] == templated
    tokens = shown["tokenize_response"]
    assert [token["id"] for token in tokens] == found["tokens"]
    data = templated.encode()
    assert all(data[token["start"] : token["stop"]].decode() == token["text"] for token in tokens)
    assert max(token["stop"] for token in tokens) == len(data)


def test_images_in_a_text_count(server: LiveServer) -> None:
    text = f"a ![]({image()}) b"
    tokens = ask(server, "/tokenize", {"inputs": text})
    assert [token["text"] for token in tokens].count("<image>") == IMAGE_TOKENS
    assert ask(server, "/tokenize", {"prompt": text})["count"] == len(tokens)
    reply = server.http.post("/generate", json={"inputs": text, "parameters": {"max_new_tokens": 1}})
    assert reply.headers["x-prompt-tokens"] == str(len(tokens))
    reply = server.http.post("/tokenize", json={"inputs": f"![]({image()})" * 5})
    assert reply.status_code == 422
    assert "at most 4" in reply.json()["error"]


def test_what_a_chat_can_say_is_counted_too(server: LiveServer) -> None:
    plain = ask(server, "/tokenize", chat("hi"))["tokens"]
    assert ask(server, "/tokenize", chat("hi", add_generation_prompt=False))["tokens"] == plain[:-1]
    continued = {
        "messages": [*chat("hi")["messages"], {"role": "assistant", "content": "He"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    assert ask(server, "/tokenize", continued)["tokens"][: len(plain)] == plain
    assert ask(server, "/tokenize", chat("hi", stream=True, model="m"))["tokens"] == plain


def test_truncate_keeps_the_last_tokens(server: LiveServer) -> None:
    tokens = ask(server, "/tokenize", {"inputs": "one two three four"})
    cut = ask(server, "/tokenize", {"inputs": "one two three four", "parameters": {"truncate": 2}})
    assert cut == tokens[-2:]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": 3}, 400),
        ("/tokenize", {"prompt": ["a"]}, 400),
        ("/tokenize", {"messages": []}, 400),
        ("/tokenize", {"inputs": None}, 422),
        ("/tokenize", {"inputs": "x", "parameters": {"truncate": -1}}, 422),
        ("/tokenize", {"inputs": "x" * (2**20 + 1)}, 422),
        ("/tokenize", {"prompt": "![](data:image/png;base64,QUJD)"}, 400),
        ("/chat_tokenize", {"inputs": "x"}, 422),
        ("/detokenize", {}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [768]}, 400),
        ("/detokenize", {"tokens": [2**70]}, 400),
        ("/detokenize", {"tokens": "text"}, 400),
        ("/detokenize", {"tokens": [0] * (2**20 + 1)}, 400),
    ],
)
def test_what_cannot_be_counted(server: LiveServer, path: str, body: Any, status: int) -> None:
    reply = server.http.post(path, json=body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert isinstance(error, str) == (status == 422)
    assert len(reply.content) < 600


def test_nothing_is_nothing(server: LiveServer) -> None:
    assert ask(server, "/tokenize", {"inputs": ""}) == []
    assert ask(server, "/tokenize", {"prompt": ""})["count"] == 0
    assert ask(server, "/detokenize", {"tokens": []}) == {"prompt": ""}


def test_others_are_answered_while_a_long_text_is_counted(server: LiveServer) -> None:
    text = "What is this? " * 9_000
    with ThreadPoolExecutor(3) as pool:
        counting = [pool.submit(ask, server, "/tokenize", {"prompt": text}) for _ in range(2)]
        assert ask(server, "/v1/chat/completions", chat("hi", max_tokens=2))["choices"]
        assert ask(server, "/tokenize", {"prompt": "hi"})["count"] >= 1
        assert [found.result()["count"] for found in counting] == [len(TOKENIZER.encode(text).ids)] * 2


def this_machine_computes_in() -> tuple[str, str]:
    """A model that is stored in bfloat16: the type and the device, by what torch says of both."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16", "cuda"
    fast = VLLM or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bfloat16" if fast else "float32", "cpu"


def test_info_in_tgis_shape_with_true_values(server: LiveServer) -> None:
    info = ask_get(server, "/info")
    today = (
        "model_id model_sha model_pipeline_tag max_concurrent_requests max_best_of max_stop_sequences "
        "max_input_tokens max_total_tokens validation_workers max_client_batch_size router version sha docker_label"
    )
    assert list(info)[:14] == today.split()
    assert (info["model_id"], info["model_pipeline_tag"]) == ("shapes", "image-text-to-text")
    assert (info["max_total_tokens"], info["max_input_tokens"]) == (4096, 4095)
    assert (info["model_dtype"], info["model_device_type"]) == this_machine_computes_in()
    assert info["max_batch_total_tokens"] >= info["max_total_tokens"]
    assert info["version"] == ask_get(server, "/version")["version"]
    answers = info["max_best_of"] + 1
    body = {"inputs": "x", "parameters": {"best_of": answers, "do_sample": True}}
    assert str(info["max_best_of"]) in server.http.post("/generate", json=body).json()["error"]


def ask_get(server: LiveServer, path: str) -> Any:
    reply = server.http.get(path)
    assert reply.status_code == 200
    return reply.json()


# Without an engine: places and time


class Slow(ScriptedBackend):
    """Takes its time, and counts who is inside."""

    def __init__(self) -> None:
        super().__init__([])
        self.inside = self.most = 0

    async def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await asyncio.sleep(0.05)
            return await super().tokenize(prompt)
        finally:
            self.inside -= 1


def counted(bodies: list[Any], backend: ScriptedBackend, **options: Any) -> list[Reply]:
    async def ask_all() -> list[Reply]:
        server = service(backend, ScriptedImages(), **options)
        replies = await asyncio.gather(*(server.call("tokenize", incoming(body, "/tokenize")) for body in bodies))
        assert server.in_flight == 0
        for reply in replies:
            reply.body = await everything(reply)
        return list(replies)

    return asyncio.run(ask_all())


def test_a_place_is_taken_and_given_back() -> None:
    *served, last = counted([{"prompt": "a"}] * 3, Slow(), job_queue_size=1, max_rolling_batch_size=1)
    assert [(reply.status, json.loads(reply.body)["count"]) for reply in served] == [(200, 2)] * 2
    assert last.status == 429
    (late,) = counted([{"inputs": "a"}], Slow(), predict_timeout=0.01)
    assert (late.status, json.loads(late.body)["error_type"]) == (408, "incomplete_generation")


def test_long_texts_are_counted_one_at_a_time_and_short_ones_together() -> None:
    for length, together in ((10, 4), (30_000, 1)):
        backend = Slow()
        replies = counted([{"prompt": "a" * length}] * 4, backend)
        assert [reply.status for reply in replies] == [200] * 4
        assert backend.most == together


def test_the_images_of_a_text_are_loaded_first() -> None:
    (reply,) = counted([{"prompt": "![](https://p.example/1.png)x"}], ScriptedBackend([]))
    assert json.loads(reply.body)["tokens"] == [1, 35, 35, 120]


def test_a_failure_of_the_tokenizer_is_ours_and_says_nothing_of_it() -> None:
    class Broken(ScriptedBackend):
        async def tokenize(self, prompt: Prompt) -> TokenizedPrompt:
            raise RuntimeError("/secret/path")

    (reply,) = counted([{"prompt": "a"}], Broken([]))
    assert reply.status == 500
    assert b"secret" not in reply.body


def test_other_threads_run_while_a_long_prompt_is_encoded() -> None:
    """The event loop is one of them: all answers that are being streamed would wait."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(SHAPES / "tokenizer.json"))
    prompt = TextPrompt([TextPart("What is this? <image> " * 40_000)])
    for image_token in (None, "<image>"):
        renderer = PromptRenderer(tokenizer, None, image_token=image_token)
        began = last = time.process_time()
        longest = 0.0
        with ThreadPoolExecutor(1) as pool:
            rendering = pool.submit(renderer.render, prompt, spans=True)
            while not rendering.done():
                time.sleep(0.001)
                longest, last = max(longest, time.process_time() - last), time.process_time()
        assert len(rendering.result().token_ids) > 100_000
        assert longest < (time.process_time() - began) / 2
