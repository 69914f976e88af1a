"""Text completions of a real engine, through OpenAI's own client: prompts of every form, scored, cut and streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image
from transformers import AutoTokenizer

from tests.support.engine_driver import Oracle, Prompt, random_image
from tests.support.live import LiveServer, chat_body, data_url

PROMPT = "What is this?"


@pytest.fixture(scope="module")
def model(tiny_llava: Path) -> Path:
    return tiny_llava


@pytest.fixture(scope="module")
def server(tiny_server: LiveServer) -> LiveServer:
    return tiny_server


@pytest.fixture(scope="module")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


def complete(client: openai.OpenAI, prompt: Any, **fields: Any) -> openai.types.Completion:
    """Greedy and of eight tokens, as all can be compared then."""
    own = {"temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    return client.completions.create(model="any", prompt=prompt, **{**own, **fields})


def test_the_answer_is_the_models_own(client: openai.OpenAI, model: Path, tokenizer: Any) -> None:
    image = random_image(3)
    ids = tokenizer(PROMPT).input_ids
    asked: list[tuple[str, list[int | Image.Image]]] = [
        (PROMPT, ids),
        (f"![an image]({data_url(image)}){PROMPT}", [image, *ids]),
    ]
    for text, items in asked:
        want = tokenizer.decode(Oracle(model).generate(Prompt(items), 8), skip_special_tokens=True)
        got = complete(client, text, extra_body={}).choices[0].text
        assert got == want or got == want.rstrip("\ufffd")


def test_all_forms_of_a_prompt_are_the_same_prompt(client: openai.OpenAI, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT).input_ids
    want = complete(client, PROMPT).choices[0].text
    for prompt in ([PROMPT], ids, [ids]):
        assert [choice.text for choice in complete(client, prompt).choices] == [want]
    several = complete(client, [PROMPT, "Hello", PROMPT])
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert [several.choices[i].text for i in (0, 2)] == [want, want]
    assert several.usage is not None
    assert several.usage.prompt_tokens == 2 * len(ids) + len(tokenizer("Hello").input_ids)
    assert several.usage.completion_tokens == 24


def test_a_streamed_batch_is_the_whole_one(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "Hello", "x"]
    for n in (1, 2):
        fields: dict[str, Any] = {"n": n, "temperature": 1.0, "seed": 7}
        whole = {choice.index: choice.text for choice in complete(client, prompts, **fields).choices}
        own = {"max_tokens": 8, "extra_body": {"ignore_eos": True}, "stream_options": {"include_usage": True}}
        stream = client.completions.create(model="any", prompt=prompts, stream=True, **own, **fields)
        texts = dict.fromkeys(range(3 * n), "")
        reasons: list[str] = []
        usage = None
        for chunk in stream:
            usage = chunk.usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                reasons += [choice.finish_reason] if choice.finish_reason else []
        assert texts == whole
        assert reasons == ["length"] * 3 * n
        assert usage is not None
        assert usage.completion_tokens == 24 * n


def test_echo_scores_a_text_as_it_was_generated(client: openai.OpenAI, tokenizer: Any) -> None:
    """What evaluation harnesses compare answers by."""
    ids = tokenizer(PROMPT).input_ids
    fields = {"logprobs": 2, "extra_body": {"ignore_eos": True, "return_token_ids": True}}
    said = complete(client, ids, **fields).choices[0]
    assert said.logprobs is not None
    answer = said.token_ids  # type: ignore[attr-defined]
    for most in (0, 1):
        scored = complete(client, ids + answer, echo=True, max_tokens=most, logprobs=2).choices[0]
        assert scored.logprobs is not None
        assert scored.logprobs.token_logprobs is not None
        assert len(scored.logprobs.token_logprobs) == len(ids) + len(answer) + most
        assert scored.logprobs.token_logprobs[0] is None
        again = scored.logprobs.token_logprobs[len(ids) : len(ids) + len(answer)]
        assert again == pytest.approx(said.logprobs.token_logprobs, abs=1e-4)
        offsets = scored.logprobs.text_offset
        assert offsets == sorted(offsets or ())


def test_a_prompt_of_one_token_can_be_scored(client: openai.OpenAI) -> None:
    choice = complete(client, [70], echo=True, max_tokens=0, logprobs=1).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [None]
    assert choice.logprobs.tokens == [choice.text]


def test_the_best_of_several_answers_is_the_most_likely(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 11, "logprobs": 0}
    every = complete(client, PROMPT, n=6, **fields).choices
    means = {
        sum(choice.logprobs.token_logprobs) / 8: choice.text  # type: ignore[union-attr, arg-type]
        for choice in every
    }
    best = complete(client, PROMPT, best_of=6, **fields).choices
    assert [choice.text for choice in best] == [means[max(means)]]


def test_a_prompt_is_cut_at_the_side_that_is_asked_for(client: openai.OpenAI, tokenizer: Any) -> None:
    ids = tokenizer("one two three four").input_ids
    for side, kept in (("left", ids[-4:]), ("right", ids[:4]), (None, ids[-4:])):
        cut = {"truncate_prompt_tokens": 4, "truncation_side": side, "return_token_ids": True}
        choice = complete(client, "one two three four", extra_body=cut).choices[0]
        assert choice.prompt_token_ids == kept  # type: ignore[attr-defined]
    long = {"truncate_prompt_tokens": -1, "return_token_ids": True}
    choice = complete(client, "x" * 3000, extra_body=long).choices[0]
    assert set(choice.prompt_token_ids) == set(tokenizer("xx", add_special_tokens=False).input_ids)  # type: ignore[attr-defined]
    assert choice.finish_reason in ("length", "stop")


def test_prompts_with_images_are_not_cut(client: openai.OpenAI) -> None:
    image = f"![]({data_url(random_image(3))})"
    plain, cut = (
        complete(client, f"{image}{PROMPT}", extra_body=extra) for extra in ({}, {"truncate_prompt_tokens": 4})
    )
    assert plain.usage is not None
    assert cut.usage is not None
    assert cut.usage.prompt_tokens == plain.usage.prompt_tokens > 16
    with pytest.raises(openai.BadRequestError, match="context"):
        complete(client, image + "x" * 3000, extra_body={"truncate_prompt_tokens": -1})


def test_logit_bias_may_name_1024_tokens(client: openai.OpenAI, tokenizer: Any) -> None:
    likely = tokenizer("q", add_special_tokens=False).input_ids[0]
    own = {"ignore_eos": True, "logit_bias": {str(likely): 100}}
    assert complete(client, PROMPT, extra_body=own).choices[0].text == "q" * 8
    with pytest.raises(openai.BadRequestError, match="logit_bias names 1025 tokens; allowed: 1024"):
        complete(client, PROMPT, logit_bias={str(number): 0 for number in range(1025)})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([2**31 - 1], "this model's are 0 to"),
        ([[1], [10**6]], "this model's are 0 to"),
        ([65, 259], "placeholders of images"),
        ("", "the prompt is empty"),
        ("x" * 3000, "context"),
        (["fine", "x" * 3000], "context"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_cannot_be_read_is_refused(
    client: openai.OpenAI, prompt: Any, message: str, stream: bool
) -> None:
    own = {} if prompt != "" else {"extra_body": {"add_special_tokens": False}}
    with pytest.raises(openai.BadRequestError, match=message):
        complete(client, prompt, stream=stream, **own)
    assert complete(client, PROMPT).choices[0].text


def test_a_chat_can_bring_a_template_where_it_is_trusted(server: LiveServer) -> None:
    template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    fields = {"chat_template": template, "return_token_ids": True, "add_special_tokens": False}
    chat = server.http.post("/v1/chat/completions", json={**chat_body("hello", **fields)}).json()
    plain = {"prompt": "[hello]", "return_token_ids": True, "add_special_tokens": False, "max_tokens": 1}
    ids = server.http.post("/v1/completions", json=plain).json()["choices"][0]["prompt_token_ids"]
    assert chat["prompt_token_ids"] == ids
    broken = chat_body("hello", chat_template="{% for %}")
    reply = server.http.post("/v1/chat/completions", json=broken)
    assert reply.status_code == 400
    assert "chat template" in reply.json()["error"]["message"]
