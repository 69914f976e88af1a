"""Offline inference with the model in the repository: answers, their order, their errors, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageDraw

from handlers import LLM, SamplingParams, StructuredOutputsParams
from handlers.errors import ImageError, ImageTooLarge, InvalidRequest
from handlers.offline.images import ImageTokens, PromptImages
from handlers.offline.prompts import read_prompt
from handlers.request import ImagePart, TextPart
from handlers.request import RequestSampling as EngineParams
from properties.problem import ConfigurationError
from tests.support.live import children_running, data_url
from tests.support.s3 import BUCKET
from tests.support.shapes import IMAGES, ROOT, SHAPES

WHAT = "What is the content of this image?"
GREEDY = SamplingParams(temperature=0, max_tokens=32)


def drawing(name: str) -> Image.Image:
    return Image.open(next(IMAGES.glob(f"{name}.*")))


def engines() -> list[psutil.Process]:
    return children_running(os.getpid(), "engine.process")


def prompt(image: object, question: str = WHAT) -> dict:
    return {"prompt": f"USER: <image>\n{question}\nASSISTANT:", "multi_modal_data": {"image": image}}


def turn(image: Image.Image, question: str = WHAT) -> list[dict]:
    parts = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(SHAPES), max_num_seqs=8, max_image_pixels=4_000_000) as llm:
        yield llm
    llm.close()
    assert not engines()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("a", use_tqdm=False)


def texts(outputs: list) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_8_bits_are_slightly_other_numbers_and_the_same_answers(llm: LLM) -> None:
    talks = [turn(Image.open(file)) for file in sorted(IMAGES.iterdir())]
    params = SamplingParams(temperature=0, max_tokens=32, logprobs=0)
    with LLM(str(SHAPES), quantize="int8") as quantised:
        found = quantised.chat(talks, params, use_tqdm=False)
    expected = llm.chat(talks, params, use_tqdm=False)
    assert texts(found) == texts(expected)
    differences = [
        abs(ours.outputs[0].cumulative_logprob - theirs.outputs[0].cumulative_logprob)
        for ours, theirs in zip(found, expected, strict=True)
    ]
    assert 0 < max(differences) < 0.5


def test_the_snippets_of_the_documentation() -> None:
    """As a script of its own without a `__main__` guard, which also must end by itself and leave nothing."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "offline.py")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "a red circle",
        "a green triangle",
        "blue",
        "a green triangle; a yellow star",
        "a red circle",
    ]
    assert "Processed prompts: 100%" in done.stderr
    assert "Traceback" not in done.stderr


def test_results_come_in_the_order_of_the_prompts_and_look_like_vllms(llm: LLM) -> None:
    names = ["red-circle", "green-triangle", "yellow-star", "black-cross"]
    outputs = llm.chat([turn(drawing(name)) for name in names * 6], GREEDY, use_tqdm=False)
    assert texts(outputs) == [f"a {name.replace('-', ' ')}" for name in names] * 6
    first = outputs[0]
    assert first.prompt is not None
    assert WHAT in first.prompt
    assert len(first.prompt_token_ids) > 60, "the image's own tokens are counted"
    answer = first.outputs[0]
    assert (answer.index, answer.finish_reason, answer.stop_reason) == (0, "stop", None)
    assert llm.get_tokenizer().decode(answer.token_ids, skip_special_tokens=True) == answer.text
    assert (answer.logprobs, answer.cumulative_logprob) == (None, None)
    assert first.finished
    assert answer.finished()
    assert first.error is None
    assert first.metrics is None


def test_each_prompt_may_have_sampling_parameters_of_its_own(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=count) for count in (1, 2, 32)]
    outputs = llm.chat([turn(drawing("red-circle"))] * 3, params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs[:2]] == [1, 2]
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "length", "stop"]
    with pytest.raises(ValueError, match="a list of 2"):
        llm.chat([turn(drawing("red-circle"))] * 2, params)


def test_without_sampling_parameters_the_models_own_count_and_16_tokens(llm: LLM) -> None:
    assert llm.get_default_sampling_params().temperature == 0
    assert llm.get_default_sampling_params().max_tokens == 16
    assert texts(llm.chat(turn(drawing("red-circle")), use_tqdm=False)) == ["a red circle"]


def test_one_bad_item_fails_alone_and_says_why(llm: LLM, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = drawing("red-circle")
    broken = tmp_path / "broken.png"
    broken.write_bytes((IMAGES / "red-circle.png").read_bytes()[:400])
    closed = Image.open(IMAGES / "yellow-star.png")
    closed.close()
    prompts = [
        prompt(good),
        prompt(Image.open(broken)),
        prompt(closed),
        prompt([good, good]),
        prompt(Image.new("RGB", (3000, 3000))),
        prompt("a path"),
        {"prompt": 5},
        7,
        {"prompt": "x", "multi_modal_data": {"video": 5}},
        {"prompt": "word " * 5000},
        {"prompt_token_ids": [10**7]},
        prompt(drawing("green-triangle")),
    ]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.error is None for output in outputs] == [True] + [False] * 10 + [True]
    assert texts(outputs)[0] == "a red circle"
    assert texts(outputs)[-1] == "a green triangle"
    assert {output.outputs[0].finish_reason for output in outputs[1:-1]} == {"error"}
    assert [str(output.error) for output in outputs[1:6]] == [
        "image 0: its data is truncated or damaged, or its file was closed",
        "image 0: its data is truncated or damaged, or its file was closed",
        "the prompt has 1 placeholders of images (<image>) and 2 images: write one for each, or none",
        "image 0: it has more than 4000000 pixels (option.max_image_pixels)",
        "image 0: it is a str; give a PIL image, an array of height x width x 3 bytes, or embeddings of tokens x "
        "hidden size",
    ]
    assert isinstance(outputs[4].error, ImageTooLarge)
    assert str(outputs[8].error) == "multi_modal_data: 'video' is not supported; allowed: 'image'"
    assert "10 of 12 prompts failed" in caplog.text


def test_what_is_not_offered_is_an_error(llm: LLM) -> None:
    with pytest.raises(TypeError, match="lora_request"):
        llm.generate("a", lora_request=object())  # type: ignore[arg-type]
    for name in ("encode", "embed", "score", "classify", "sleep", "wake_up", "beam_search"):
        with pytest.raises(AttributeError, match=name):
            getattr(llm, name)
    for params in ({"use_beam_search": True}, {"logits_processors": [print]}):
        with pytest.raises(ValueError, match="is not supported"):
            SamplingParams(**params)
    for data in ({"audio": b"x"}, {"video": b"x"}, {"image": np.zeros((4, 8), dtype=np.float32)}):
        (output,) = llm.generate([{"prompt": "x", "multi_modal_data": data}], use_tqdm=False)
        assert output.error is not None


def test_what_was_set_wrong_later_fails_alone_too(llm: LLM) -> None:
    wrong = [SamplingParams(), SamplingParams(), SamplingParams()]
    wrong[0].n = "many"
    wrong[1].temperature = -3
    first, second, third = llm.generate(["a", "b", "c"], wrong, use_tqdm=False)
    assert (str(first.error), len(first.outputs)) == ("n is 'many'; allowed: from 1 to 16384", 1)
    assert str(second.error) == "temperature is -3.0; allowed: from 0 to 100"
    assert third.error is None


def test_an_error_is_raised_for_a_prompt_alone_or_where_that_is_asked_for(llm: LLM) -> None:
    bad = prompt(np.zeros((4, 4), dtype=np.float32))
    with pytest.raises(ImageError):
        llm.generate(bad, use_tqdm=False)
    assert llm.generate(bad, use_tqdm=False, raise_on_error=False)[0].error is not None
    late = {"prompt": "word " * 5000}  # fails in the backend, not here
    for each in (bad, late):
        with pytest.raises(InvalidRequest):
            llm.generate([prompt(drawing("red-circle")), each], use_tqdm=False, raise_on_error=True)
    assert texts(llm.chat(turn(drawing("red-circle")), GREEDY, use_tqdm=False)) == ["a red circle"]


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.convert("P"),
        lambda image: image.convert("RGBA"),
        lambda image: np.asarray(image.convert("RGB")),
        lambda image: torch.from_numpy(np.array(image.convert("RGB"))),
    ],
)
def test_images_of_every_kind(llm: LLM, change) -> None:  # type: ignore[no-untyped-def]
    text = f"<|user|><image>{WHAT}</s><|assistant|>"
    given = {"prompt": text, "multi_modal_data": {"image": change(drawing("yellow-star"))}}
    outputs = llm.generate(given, GREEDY, use_tqdm=False)
    assert texts(outputs) == ["a yellow star"]


def test_an_image_is_turned_upright_and_left_as_it_was(llm: LLM, tmp_path: Path) -> None:
    """Two shapes side by side, stored lying on their side: only upright is the star on the left."""
    upright = drawing("orange-star-and-blue-square").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.jpg", exif=exif, quality=95)
    lying = Image.open(tmp_path / "lying.jpg")
    size = lying.size
    assert texts(llm.chat(turn(lying), GREEDY, use_tqdm=False)) == ["an orange star and a blue square"]
    assert lying.size == size


def test_the_same_pixels_are_prepared_once_however_they_come(llm: LLM) -> None:
    image = drawing("black-cross").convert("RGB")
    first = llm.chat(turn(image), GREEDY, use_tqdm=False)[0]
    again = llm.chat(turn(image.convert("RGBA")), GREEDY, use_tqdm=False)[0]
    assert again.prompt_token_ids == first.prompt_token_ids
    assert again.num_cached_tokens >= 64, "the prefix cache knows the image again"
    other = llm.chat(turn(drawing("yellow-star").convert("RGB").resize(image.size)), GREEDY, use_tqdm=False)[0]
    assert other.outputs[0].text == "a yellow star"
    assert other.num_cached_tokens < 16


def test_images_stand_where_their_placeholders_do() -> None:
    one, two = Image.new("RGB", (1, 1)), Image.new("RGB", (2, 2))
    one_token = PromptImages(SHAPES, lambda part: ImageTokens(3, 1), None)

    def read(text: str, *images: Image.Image, own: str | None = "<image>") -> list[object]:
        found = read_prompt({"prompt": text, "multi_modal_data": {"image": list(images)}}, own, one_token)
        return [part.text if isinstance(part, TextPart) else part.given for part in found.parts]

    assert read("a<image>b<image>c", one, two) == ["a", one, "b", two, "c"]
    assert read("a", one, two) == [one, two, "a"]
    assert read("<|image_2|>, <|image_1|>", one, two, own="<|image|>") == [two, ", ", one]
    assert read("<|vision_start|><|image_pad|><|vision_end|>a", one) == [one, "a"]
    assert read("<start_of_image>a", one, own=None) == [one, "a"]
    assert read("<image>a", one, own="<|image_pad|>") == [one, "a"]
    assert read("[IMG] costs 5", own="<image>") == ["[IMG] costs 5"]
    for text, given in (("<image>", ()), ("<image>", (one, two)), ("<|image_1|><|image_3|>", (one, two))):
        with pytest.raises(InvalidRequest):
            read(text, *given)


def test_token_ids_with_and_without_images(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode(f"<s><|user|><image>{WHAT}</s><|assistant|>", add_special_tokens=False)
    given = {"prompt_token_ids": ids, "multi_modal_data": {"image": drawing("red-circle")}}
    named = {**given, "multi_modal_uuids": {"image": ["mine"]}}
    missing = {**named, "multi_modal_data": {"image": [None]}}
    outputs = llm.generate([given, {"prompt_token_ids": ids}, ids[:2], named, missing], GREEDY, use_tqdm=False)
    assert outputs[3].outputs[0].text == "a red circle"
    assert isinstance(outputs[4].error, ImageError)
    assert outputs[0].outputs[0].text == "a red circle"
    assert outputs[0].prompt is None
    assert outputs[1].error is not None, "a placeholder without an image"
    assert outputs[2].error is None


def test_several_images_and_urls_in_a_conversation(llm: LLM) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": data_url(drawing("red-circle"))}},
        {"type": "image_pil", "image_pil": drawing("green-triangle")},
        {"type": "text", "text": "What is in the second image?"},
    ]
    conversation = [{"role": "user", "content": content}]
    assert texts(llm.chat(conversation, GREEDY, use_tqdm=False)) == ["a green triangle"]
    content[2]["text"] = "What is in the first image?"
    assert texts(llm.chat([conversation], GREEDY, use_tqdm=False)) == ["a red circle"]


def test_n_best_of_and_log_probabilities(llm: LLM) -> None:
    conversation = turn(drawing("red-circle"))
    three = llm.chat(conversation, SamplingParams(n=3, temperature=1.0, seed=1, logprobs=2), use_tqdm=False)[0]
    assert [answer.index for answer in three.outputs] == [0, 1, 2]
    for answer in three.outputs:
        assert answer.logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids)
        chosen = [entry[token] for entry, token in zip(answer.logprobs, answer.token_ids, strict=True)]
        assert answer.cumulative_logprob == pytest.approx(sum(one.logprob for one in chosen))
        assert all(len(entry) in (2, 3) for entry in answer.logprobs)
    hot = {"temperature": 20.0, "seed": 7, "max_tokens": 4, "ignore_eos": True}
    four = llm.chat(conversation, SamplingParams(n=4, logprobs=0, **hot), use_tqdm=False)[0].outputs
    best = llm.chat(conversation, SamplingParams(n=2, best_of=4, **hot), use_tqdm=False)[0].outputs
    ranked = sorted(four, key=lambda answer: -(answer.cumulative_logprob or 0))
    assert [answer.token_ids for answer in best] == [answer.token_ids for answer in ranked[:2]]
    assert [(answer.index, answer.logprobs, answer.cumulative_logprob) for answer in best] == [
        (0, None, None),
        (1, None, None),
    ]
    assert len({tuple(answer.token_ids) for answer in four}) > 1


def test_what_vllms_own_examples_write_out_is_taken(llm: LLM) -> None:
    """Their script for vision models gives `lora_request`, None where the model has no adapter."""
    asked = prompt(drawing("red-circle"))
    outputs = llm.generate([asked], sampling_params=GREEDY.clone(), lora_request=None, use_tqdm=False)
    assert texts(outputs) == ["a red circle"]
    assert (outputs[0].metrics, outputs[0].lora_request) == (None, None)
    chat = turn(drawing("red-circle"))
    positional = llm.chat(chat, GREEDY, False, None, None, "auto")
    assert texts(positional) == ["a red circle"]
    with pytest.raises(TypeError, match="lora_request is not supported"):
        llm.generate([asked], GREEDY, lora_request=object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give it to LLM"):
        llm.chat(chat, GREEDY, chat_template_content_format="string")


def test_prompt_log_probabilities(llm: LLM) -> None:
    output = llm.generate("Hello", SamplingParams(max_tokens=1, prompt_logprobs=1), use_tqdm=False)[0]
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for entry, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True):
        assert entry is not None
        assert entry[token].logprob <= 0


def test_sampling_parameters_have_vllms_names_defaults_and_checks() -> None:
    params = SamplingParams()
    assert (params.n, params.max_tokens, params.temperature, params.top_p, params.top_k) == (
        1,
        16,
        1.0,
        1.0,
        0,
    )
    assert params.engine_params() == EngineParams(max_tokens=16)
    assert SamplingParams(stop="a").engine_params().stop == ("a",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[3]).engine_params().stop == ("a", "b")
    named = set(inspect.signature(SamplingParams).parameters)
    for name in EngineParams.__struct_fields__:
        assert name in named or getattr(params, name) == getattr(EngineParams(), name)
    assert SamplingParams(typical_p=0.5).engine_params().typical_p == 0.5
    for bad in (
        {"temperature": -1},
        {"top_p": 0},
        {"n": 0},
        {"n": 3, "best_of": 2},
        {"stop": ""},
        {"truncate_prompt_tokens": 0},
        {"truncate_prompt_tokens": -2},
        {"min_p": "x"},
    ):
        with pytest.raises(ValueError, match=next(reversed(bad))):
            SamplingParams(**bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="did you mean temperature"):
        SamplingParams(temprature=0.5)
    with pytest.raises(TypeError, match="did you mean max_tokens"):
        params.max_token = 4
    with pytest.raises(ValueError, match="use_beam_search is not supported"):
        SamplingParams(use_beam_search=True)
    SamplingParams(use_beam_search=False, detokenize=True, output_kind=2, bad_words=[])
    params.stop_token_ids = [5]
    assert params.engine_params().stop_token_ids == (5,)


def test_structured_outputs(llm: LLM) -> None:
    shapes = ["blue square", "red circle", "yellow star"]
    params = [
        SamplingParams(temperature=0, structured_outputs=StructuredOutputsParams(choice=shapes)),
        SamplingParams(temperature=0, guided_decoding={"regex": "(a|the) (yellow|red) (star|circle)"}),
    ]
    outputs = llm.chat([turn(drawing("red-circle")), turn(drawing("yellow-star"))], params, use_tqdm=False)
    assert texts(outputs) == ["red circle", "a yellow star"]


def test_structured_outputs_are_checked_at_once() -> None:
    for given in ({"regex": "a+"}, StructuredOutputsParams(regex="a+")):
        for name in ("structured_outputs", "guided_decoding"):
            constraint = SamplingParams(**{name: given}).constraint()  # type: ignore[arg-type]
            assert constraint is not None
            assert (constraint.kind, constraint.value) == ("regex", "a+")
    with pytest.raises(ValueError, match="structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a", "choice": ["b"]})


def test_unknown_and_bad_arguments_say_what_was_meant() -> None:
    with pytest.raises(TypeError, match=r"max_modl_len.*did you mean max_model_len"):
        LLM(str(SHAPES), max_modl_len=64)
    with pytest.raises(TypeError, match="hf_overrides"):
        LLM(str(SHAPES), hf_overrides={"a": 1})
    with pytest.raises(ConfigurationError, match=r"LLM's argument gpu_memory_utilization.*above 0"):
        LLM(str(SHAPES), gpu_memory_utilization=7)
    with pytest.raises(ConfigurationError, match="no model"):
        LLM(str(ROOT / "docs"))
    assert len(engines()) <= 1, "none but the one that all tests share"


def test_vllms_arguments_are_taken_and_what_has_no_effect_is_said(
    caplog: pytest.LogCaptureFixture,
    s3: Any,
    tmp_path: Path,
) -> None:
    """With a model from S3; and its processes end with the object."""
    for path in SHAPES.iterdir():
        if path.suffix in (".json", ".jinja", ".safetensors"):
            s3.put_object(Bucket=BUCKET, Key=f"shapes/{path.name}", Body=path.read_bytes())
    s3.put_object(Bucket=BUCKET, Key="shapes/serving.properties", Body=b"option.max_model_len=512")
    llm = LLM(
        model=f"s3://{BUCKET}/shapes/",
        download_dir=str(tmp_path),
        trust_remote_code=False,
        tensor_parallel_size=1,
        dtype="bfloat16",
        gpu_memory_utilization=0.8,
        enforce_eager=True,
        cpu_offload_gb=1,
        swap_space=4,
        allowed_local_media_path="/data",
        tokenizer=None,
        limit_mm_per_prompt={"image": 1},
        media_io_kwargs={"image": {"rgba_background_color": [255, 0, 0]}},
    )
    assert "cpu_offload_gb" in caplog.text
    assert "enforce_eager" not in caplog.text
    assert "swap_space has no effect here" in caplog.text
    told = [line for line in caplog.messages if "allowed_local_media_path" in line]
    assert told == ["LLM's allowed_local_media_path has no effect here: open a file with Pillow and give the image"]
    assert "gpu_memory_utilization" not in caplog.text
    clear = Image.new("RGBA", (200, 200))
    ImageDraw.Draw(clear).ellipse((60, 60, 140, 140), fill="blue")
    assert texts(llm.chat(turn(clear, "What's the color of this image?"), GREEDY, use_tqdm=False)) == ["red"]
    two = {"prompt": "<image><image>a", "multi_modal_data": {"image": [clear, clear]}}
    with pytest.raises(InvalidRequest, match="limit_mm_per_prompt allows 1"):
        llm.generate(two, use_tqdm=False)
    with pytest.raises(InvalidRequest, match="context is 512 tokens"):
        llm.generate([5] * 600, use_tqdm=False)
    before = engines()
    process = next(p for p in before if p.create_time() == max(q.create_time() for q in before))
    del llm
    gc.collect()
    assert not process.is_running()


def test_an_engine_that_dies_costs_no_answer(llm: LLM) -> None:
    conversations = [turn(drawing(name)) for name in ("red-circle", "yellow-star") * 12]
    (process,) = engines()
    slow = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    outputs: list = []
    asking = threading.Thread(target=lambda: outputs.extend(llm.chat(conversations, slow, use_tqdm=False)))
    asking.start()
    while not _busy(llm) and asking.is_alive():
        time.sleep(0.001)
    process.kill()
    asking.join(90)
    assert len(outputs) == 24
    assert [output.error for output in outputs] == [None] * 24
    # What is written behind an answer's end may hang on what shares the batch, where numbers are short.
    for text, right in zip(texts(outputs), ("a red circle", "a yellow star") * 12, strict=True):
        assert text.startswith(right)
    assert {len(output.outputs[0].token_ids) for output in outputs} == {32}


def _busy(llm: LLM) -> bool:
    return llm._core.backend.stats().running > 0


def test_inside_a_running_event_loop_and_from_several_threads(llm: LLM) -> None:
    async def notebook() -> list[str]:
        return texts(llm.chat(turn(drawing("red-circle")), GREEDY, use_tqdm=False))

    assert asyncio.run(notebook()) == ["a red circle"]
    answers: dict[str, list[str]] = {}

    def ask(name: str) -> None:
        answers[name] = texts(llm.chat([turn(drawing(name))] * 3, GREEDY, use_tqdm=False))

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("red-circle", "yellow-star")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {"red-circle": ["a red circle"] * 3, "yellow-star": ["a yellow star"] * 3}


def test_an_interrupt_aborts_what_runs(llm: LLM) -> None:
    """As Ctrl-C does: the exception passes through, and nothing goes on generating."""

    class Bar:
        def __init__(self, **given: object) -> None:
            pass

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            raise KeyboardInterrupt

        def update(self, count: int = 1) -> None:
            pass

    long = SamplingParams(temperature=0, max_tokens=1500, ignore_eos=True)
    short = SamplingParams(temperature=0, max_tokens=1)
    with pytest.raises(KeyboardInterrupt):
        llm.chat([turn(drawing("red-circle"))] * 6, [short, *[long] * 5], use_tqdm=Bar)
    end = time.monotonic() + 10
    while _busy(llm) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _busy(llm)
    assert texts(llm.chat(turn(drawing("red-circle")), GREEDY, use_tqdm=False)) == ["a red circle"]


def test_importing_the_handlers_stays_light() -> None:
    heavy = "{'torch', 'transformers', 'PIL', 'tqdm'}"
    code = f"import sys, handlers; assert not {heavy} & set(sys.modules); print(handlers.LLM)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    assert "LLM" in done.stdout
    assert ImagePart("").given is None


def test_no_prompts_no_work(llm: LLM) -> None:
    assert llm.generate([], use_tqdm=False) == []
    assert llm.chat([], use_tqdm=False) == []
    with pytest.raises(TypeError):
        llm.generate(5)
    with pytest.raises(TypeError):
        llm.chat("hello")
