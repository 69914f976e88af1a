"""Gemma 3 and PaliGemma on the embedded engine: images, or whole prompts, that are seen both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.families.gemma3 import Gemma3Metadata, Gemma3Preprocessor
from engine.sampling_params import SamplingParams
from handlers import LLM, StructuredOutputsParams
from handlers import SamplingParams as OfflineParams
from handlers.errors import InvalidRequest
from handlers.prompts.renderer import PromptRenderer
from handlers.request import ChatPrompt, ImagePart, Message, TextPart
from tests.support.engine_driver import Oracle, Prompt, load_engine, run_all
from tests.support.exactness import check_random_load, prompts_with, small_images
from tests.support.likeness import check_two_ranks
from tests.support.tiny_gemma import END, GEMMA3_TEMPLATE, SOFT, START, inputs, make_gemma3, make_paligemma

MODELS = {
    "gemma3": make_gemma3,
    "paligemma": make_paligemma,
    "paligemma2": lambda path: make_paligemma(path, second=True),
}


class PrefixOracle(Oracle):
    """PaliGemma's prompts are seen both ways also where they have no image."""

    def inputs(self, prompt: Prompt, ids: torch.Tensor) -> dict[str, Any]:
        return {**super().inputs(prompt, ids), "token_type_ids": torch.zeros_like(ids)}


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    path = MODELS[request.param](tmp_path_factory.mktemp("models") / request.param)
    kind = Oracle if request.param == "gemma3" else PrefixOracle
    # transformers' sdpa leaves the caps of attention scores out
    eager = "eager" if request.param == "paligemma2" else "sdpa"
    return path, kind(path, inputs, attn_implementation=eager)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_equal_generate_for_random_loads(model: tuple[Path, Oracle], seed: int) -> None:
    path, oracle = model
    check_random_load(path, oracle, seed, prompts_with(small_images()))


def test_the_log_probabilities_of_a_prompt_are_transformers(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    images = small_images()
    prompt = Prompt([*range(65, 80), images[1], *range(80, 85), images[2], images[3], *range(85, 99)])
    add = prompt.add(oracle.preprocessor, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))
    engine = load_engine(path, max_num_batched_tokens=8, max_num_seqs=2)
    (output,) = run_all(engine, [add])[0].outputs
    assert output.prompt_logprobs is not None
    ids = torch.tensor([add.token_ids])
    with torch.inference_mode():
        logits = oracle.model(ids, **oracle.inputs(prompt, ids)).logits[0]
    cap = getattr(oracle.model.config.get_text_config(), "final_logit_softcapping", None)
    if cap is not None:
        # transformers' PaliGemma 2 leaves this cap out, which the model was trained with
        logits = cap * torch.tanh(logits / cap)
    want = torch.log_softmax(logits, -1)
    for number, (entry, token) in enumerate(zip(output.prompt_logprobs, add.token_ids[1:], strict=True)):
        assert entry.logprobs[0] == pytest.approx(float(want[number, token]), abs=1e-4)


def test_prefixes_are_shared_only_where_that_is_right(model: tuple[Path, Oracle]) -> None:
    """Gemma 3's blocks inside an image stand for the whole image; PaliGemma shares only equal prompts."""
    path, oracle = model
    first, second = small_images()[:2]
    head = list(range(65, 75))
    prompts = [Prompt([*head, image, *tail]) for image in (first, second) for tail in ([1, 2, 3], [4, 5])]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    engine = load_engine(path, block_size=1)
    for _ in range(2):
        for prompt in prompts:
            got = run_all(engine, [prompt.add(oracle.preprocessor, params)])[0]
            assert got.token_ids == oracle.generate(prompt, 8, ignore_eos=True)
    assert engine.pool.hits > 0


def test_two_ranks_give_the_same_tokens(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    images = small_images()
    prompts = [Prompt([65, 66, images[0], 67]), Prompt([images[1], 68, images[2], 69]), Prompt([70, 71])]
    check_two_ranks(path, oracle, prompts)


def test_a_chat_through_the_whole_way(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    image = small_images()[0]
    parts = [{"type": "text", "text": "A B"}, {"type": "image_pil", "image_pil": image}]
    turn = [{"role": "user", "content": parts}]
    greedy = {"temperature": 0, "max_tokens": 10, "ignore_eos": True}
    with LLM(str(path), dtype="float32") as llm:
        (output,) = llm.chat(turn, OfflineParams(**greedy, n=2), use_tqdm=False)
        text = output.outputs[0].text
        (cut,) = llm.chat(turn, OfflineParams(**greedy, stop=[text[3:5]]), use_tqdm=False)
        digits = StructuredOutputsParams(regex="[0-9]{4}")
        limited = OfflineParams(temperature=0, max_tokens=10, structured_outputs=digits)
        (number,) = llm.chat(turn, limited, use_tqdm=False)
        plain = {"prompt": "A B", "multi_modal_data": {"image": image}}
        (completed,) = llm.generate(plain, OfflineParams(**greedy), use_tqdm=False)
        if "gemma3" not in path.name:
            earlier = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, *turn]
            for wrong, why in ((earlier, "single user message"), ([{"role": "user", "content": "A"}], "an image")):
                with pytest.raises(InvalidRequest, match=why):
                    llm.chat(wrong, OfflineParams(**greedy), use_tqdm=False)
    token = SOFT if "gemma3" in path.name else 259
    count = 4 if token == SOFT else 16
    for result in (output, completed):
        ids = result.prompt_token_ids
        place = ids.index(token)
        assert ids[place : place + count] == [token] * count
        want = oracle.generate(Prompt([*ids[:place], image, *ids[place + count :]]), 10, ignore_eos=True)
        assert [list(choice.token_ids) for choice in result.outputs] == [want] * len(result.outputs)
    if token == SOFT:
        place = output.prompt_token_ids.index(token)
        newline = output.prompt_token_ids[place - 2]
        assert output.prompt_token_ids[place - 3 : place] == [newline, newline, START]
        assert output.prompt_token_ids[place + 4 : place + 7] == [END, newline, newline]
    else:
        assert output.prompt_token_ids == completed.prompt_token_ids
        assert output.prompt_token_ids[15:18] == [token, 256, ord("A") - 33]
    assert cut.outputs[0].text == text[: text.index(text[3:5])]
    assert number.outputs[0].text.isdigit()


def test_the_line_breaks_around_an_image_are_tokenised_with_the_text(tmp_path: Path) -> None:
    """As transformers' processor does it, which writes them into the text; the client's own tokens stay text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "ĊĊ", "ĊĊĊ"]
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ")]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<s>", "<|user|>", "<|end|>", "<start_of_image>", "<image_soft_token>", "<end_of_image>"]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    start, soft, end = tokenizer.convert_tokens_to_ids(names[3:])
    metadata = Gemma3Metadata(image_token_id=soft, recipe=None, num_tokens=1, start_token_id=start, end_token_id=end)
    written = Gemma3Preprocessor(metadata).written(tokenizer)
    for content_format in ("openai", "string"):
        renderer = PromptRenderer(tokenizer, GEMMA3_TEMPLATE, content_format, "<image_soft_token>", written=written)
        parts = [ImagePart("data:"), TextPart("\nWhat? <start_of_image>")]
        rendered = renderer.render(ChatPrompt([Message("user", parts)], add_generation_prompt=False))
        between = "" if content_format == "openai" else "\n"
        want = tokenizer(
            "<s><|user|>\n\n\n<start_of_image><image_soft_token><end_of_image>\n\n"
            f"{between}\nWhat? <start_of_{{}}image><|end|>\n",
            add_special_tokens=False,
        ).input_ids
        brace = tokenizer("{}", add_special_tokens=False).input_ids
        assert rendered.token_ids == [token for token in want if token not in brace]
        assert rendered.token_ids[2] == len(alphabet) + 1, "the template's break and the image's two are one token"
        assert rendered.token_ids.count(start) == 1
