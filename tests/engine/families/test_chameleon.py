"""Chameleon on the embedded engine: discrete image tokens, and words that are never chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.sampling_params import SamplingParams
from handlers import LLM, StructuredOutputsParams
from handlers import SamplingParams as OfflineParams
from tests.support.engine_driver import CAPITALS, Oracle, Prompt, load_engine, random_image, run_all
from tests.support.exactness import check_random_load, prompts_with
from tests.support.likeness import check_two_ranks, noise
from tests.support.tiny_chameleon import CODES, END, FIRST_WORD, SEPARATOR, START, make_chameleon

WORDS = range(FIRST_WORD, FIRST_WORD + CODES)


def images() -> list[Image.Image]:
    """All of the size that the model sees, so that their codes do not hang on a resize; and one that is not."""
    flat = [Image.new("RGB", (32, 32), color) for color in ("red", "white", "black")]
    return [*flat, *(noise(32, 32, seed) for seed in range(3)), random_image(1)]


@pytest.fixture(scope="module", params=[False, True], ids=["7b", "swin"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    path = make_chameleon(tmp_path_factory.mktemp("models") / "chameleon", swin_norm=request.param)
    return path, Oracle(path)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_equal_generate_for_random_loads(model: tuple[Path, Oracle], seed: int) -> None:
    path, oracle = model
    check_random_load(path, oracle, seed, prompts_with(images()))


def test_images_differ_in_their_codes(model: tuple[Path, Oracle]) -> None:
    """Else the test above could not tell one image from another."""
    _, oracle = model
    assert oracle.preprocessor is not None
    pixels = [torch.from_numpy(oracle.preprocessor.prepare(i).tensors["pixel_values"]) for i in images()]
    codes = {tuple(oracle.model.get_image_tokens(one[None])[0].tolist()) for one in pixels}
    assert len(codes) == len(images())


def test_log_probabilities_are_transformers_and_image_words_have_none(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    prompt = Prompt([*range(65, 80), images()[4], *range(80, 90), images()[0], FIRST_WORD, 91])
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, logprobs=20)
    add = prompt.add(oracle.preprocessor, params)
    engine = load_engine(path, max_num_batched_tokens=8, max_num_seqs=2)
    (output,) = run_all(engine, [add])[0].outputs
    ids = torch.tensor([add.token_ids])
    with torch.inference_mode():
        want = torch.log_softmax(oracle.model(ids, **oracle.inputs(prompt, ids)).logits[0], -1)
    assert output.prompt_logprobs is not None
    for number, (entry, token) in enumerate(zip(output.prompt_logprobs, add.token_ids[1:], strict=True)):
        assert entry.logprobs[0] == pytest.approx(float(want[number, token]), abs=1e-4, rel=1e-4)
    assert output.logprobs is not None
    assert not set(output.logprobs[0].token_ids) & set(WORDS)


def test_two_ranks_give_the_same_tokens(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    some = images()
    prompts = [Prompt([65, 66, some[0], 67]), Prompt([some[4], 68, some[5], 69]), Prompt([70, 71])]
    check_two_ranks(path, oracle, prompts)


def test_a_chat_through_the_whole_way(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    image = images()[4]
    parts = [{"type": "text", "text": "A"}, {"type": "image_pil", "image_pil": image}]
    turn = [{"role": "user", "content": parts}]
    greedy = OfflineParams(temperature=0, max_tokens=10, ignore_eos=True, n=2)
    with LLM(str(path), dtype="float32") as llm:
        (output,) = llm.chat(turn, greedy, use_tqdm=False)
        plain = {"prompt": "A<image>", "multi_modal_data": {"image": image}}
        (completed,) = llm.generate(plain, greedy, use_tqdm=False)
        anything = StructuredOutputsParams(regex="(.|\\n)*")
        hot = OfflineParams(temperature=2, max_tokens=40, seed=1, structured_outputs=anything)
        (free,) = llm.chat(turn, hot, use_tqdm=False)
        letters = {"temperature": 0, "max_tokens": 10, "ignore_eos": True, "allowed_token_ids": CAPITALS}
        written = llm.chat(turn, OfflineParams(**letters), use_tqdm=False)[0].outputs[0].text
        stop = written[2]
        (stopped,) = llm.chat(turn, OfflineParams(**letters, stop=[stop]), use_tqdm=False)
    letter = ord("A") - 33
    for result in (output, completed):
        ids = result.prompt_token_ids
        assert ids[-20:] == [letter, START, *[259] * 16, END, SEPARATOR]
        place = len(ids) - 19
        want = oracle.generate(Prompt([*ids[:place], image, SEPARATOR]), 10, ignore_eos=True)
        assert [list(choice.token_ids) for choice in result.outputs] == [want, want]
    assert output.prompt_token_ids == [256, *completed.prompt_token_ids]
    assert not set(free.outputs[0].token_ids) & {*WORDS, 259}
    assert stopped.outputs[0].text == written[: written.index(stop)]
    assert stopped.outputs[0].finish_reason == "stop"
