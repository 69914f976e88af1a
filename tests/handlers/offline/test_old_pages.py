"""vLLM's pages on vision models from 0.3 to 0.6, snippet by snippet: only the import and the model are others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from handlers import LLM, ImageFeatureData, ImagePixelData, MultiModalData, SamplingParams
from handlers.errors import ImageError, InvalidRequest
from handlers.offline.images import ImageTokens, PromptImages
from handlers.offline.prompts import prompts_with_data, read_prompt
from handlers.request import EmbeddingsPart, ImagePart, TextPart
from tests.support.models import text_config
from tests.support.shapes import SHAPES, drawing, tower_features, tower_pixels

QUESTION = "\nUSER: What is the content of this image?\nASSISTANT:"
PROMPT = "<image>" * 64 + QUESTION
GREEDY = SamplingParams(temperature=0, max_tokens=16)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(
        model=str(SHAPES),
        image_input_type="pixel_values",
        image_token_id=3,
        image_input_shape="1,3,96,96",
        image_feature_size=64,
    ) as made:
        yield made


@pytest.fixture(scope="module")
def pixels() -> dict[str, torch.Tensor]:
    return {name: tower_pixels(name) for name in ("red-circle", "yellow-star")}


def texts(outputs: list[Any]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_the_page_of_0_5_0(llm: LLM) -> None:
    image = drawing("red-circle")
    prompt = "<image>" * 64 + ("\nUSER: What is the content of this image?\nASSISTANT:")

    outputs = llm.generate({
        "prompt": prompt,
        "multi_modal_data": ImagePixelData(image),
    })  # fmt: skip

    assert texts(outputs) == ["a red circle"]
    (plain,) = llm.generate([{"prompt": "<image>" + QUESTION, "multi_modal_data": {"image": image}}])
    assert outputs[0].prompt_token_ids == plain.prompt_token_ids
    assert outputs[0].prompt_token_ids.count(3) == 64


def test_the_pages_before_0_5(llm: LLM, pixels: dict[str, torch.Tensor]) -> None:
    image = drawing("red-circle")
    outputs = llm.generate(PROMPT, multi_modal_datas=ImagePixelData(image))
    assert texts(outputs) == ["a red circle"]
    data = MultiModalData(type=MultiModalData.Type.IMAGE, data=pixels["yellow-star"])
    for outputs in (
        llm.generate(PROMPT, multi_modal_datas=data),
        llm.generate(PROMPT, sampling_params=SamplingParams(max_tokens=150, temperature=0), multi_modal_data=data),
    ):
        assert texts(outputs) == ["a yellow star"]
    both = MultiModalData(MultiModalData.Type.IMAGE, torch.cat(list(pixels.values())))
    assert texts(llm.generate([PROMPT] * 2, multi_modal_data=both)) == ["a red circle", "a yellow star"]


def test_prompts_in_tokens_too(llm: LLM) -> None:
    ids = [3] * 64 + llm.get_tokenizer()(QUESTION, add_special_tokens=False)["input_ids"]
    data = ImagePixelData(drawing("yellow-star"))
    for outputs in (
        llm.generate({"prompt_token_ids": ids, "multi_modal_data": data}),
        llm.generate(prompt_token_ids=ids, multi_modal_data=data),
        llm.generate(prompt_token_ids=[ids], multi_modal_data=[data]),
        llm.generate({"prompt_token_ids": [3, *ids[64:]], "multi_modal_data": data}),
    ):
        assert texts(outputs) == ["a yellow star"]
        assert outputs[0].prompt_token_ids == ids


def test_tensors_of_pixels_answer_as_the_image_does(llm: LLM, pixels: dict[str, torch.Tensor]) -> None:
    tensor = pixels["red-circle"]
    given = [tensor, tensor[0], tensor.half(), tensor.bfloat16(), tensor[0].numpy()]
    prompts: list[Any] = [{"prompt": PROMPT, "multi_modal_data": ImagePixelData(one)} for one in given]
    prompts.append({"prompt": PROMPT, "multi_modal_data": {"image": tensor}})
    assert set(texts(llm.generate(prompts))) == {"a red circle"}


def test_features_and_embeddings() -> None:
    llm = LLM(
        model=str(SHAPES),
        image_input_type="image_features",
        image_token_id=3,
        image_input_shape="1,64,160",
        image_feature_size=64,
    )
    star, projected = tower_features("yellow-star")
    several = torch.cat([tower_features("red-circle")[1], projected])
    with llm:
        outputs = llm.generate({"prompt": PROMPT, "multi_modal_data": ImageFeatureData(star)})
        assert texts(outputs) == ["a yellow star"]
        data = MultiModalData(type=MultiModalData.Type.IMAGE, data=star)
        assert texts(llm.generate(PROMPT, multi_modal_data=data)) == ["a yellow star"]
        # The pages from 0.5.1 on: what comes out of the projector.
        prompt = "USER: <image>\nWhat is the content of this image?\nASSISTANT:"
        for image in (
            projected,
            projected[0],
            [projected],
            {"image_embeds": projected},
            projected.bfloat16(),
        ):
            outputs = llm.generate({"prompt": prompt, "multi_modal_data": {"image": image}})
            assert texts(outputs) == ["a yellow star"]
        question = "USER: <image><image>\nWhat is the content of each image?\nASSISTANT:"
        each = llm.generate({"prompt": question, "multi_modal_data": {"image": several}})
        same = llm.generate({"prompt": question, "multi_modal_data": {"image": list(several)}})
        seen = [drawing("red-circle"), drawing("yellow-star")]
        assert (
            texts(each) == texts(same) == texts(llm.generate({"prompt": question, "multi_modal_data": {"image": seen}}))
        )


def test_a_model_with_the_pages_own_numbers(tmp_path: Path) -> None:
    """576 tokens of id 32000, made of 336 x 336 pixels, as llava-1.5 has them; its weights are random."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: number for number, char in enumerate(alphabet)}
    vocabulary |= {f"filler {number}": number for number in range(len(alphabet), 32_000)}
    backend = Tokenizer(models.BPE(vocab=vocabulary | {"<image>": 32_000}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="filler 300").save_pretrained(tmp_path)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14,
        initializer_range=0.5, initializer_factor=4.0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(vocab_size=32_064, max_position_embeddings=1024),
        image_token_index=32_000,
        vision_feature_layer=-1,
        image_seq_length=576,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    size = {"height": 336, "width": 336}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(tmp_path)

    llm = LLM(
        model=str(tmp_path),
        image_input_type="pixel_values",
        image_token_id=32000,
        image_input_shape="1,3,336,336",
        image_feature_size=576,
        disable_image_processor=False,
    )
    prompt = "<image>" * 576 + ("\nUSER: What is the content of this image?\nASSISTANT:")
    images = [drawing("red-circle"), drawing("yellow-star")]
    with llm:
        (output,) = llm.generate({"prompt": prompt, "multi_modal_data": ImagePixelData(images[0])}, GREEDY)
        assert output.prompt_token_ids[:576] == [32_000] * 576
        answers = llm.generate([
            {"prompt": "<image>" + QUESTION, "multi_modal_data": {"image": image}} for image in images
        ], GREEDY)  # fmt: skip
    assert output.outputs[0].token_ids == answers[0].outputs[0].token_ids != answers[1].outputs[0].token_ids


def images(size: int | None = None, tokens: int = 4) -> PromptImages:
    """Of a model whose images have that many tokens of id 9; no model is asked."""
    return PromptImages(SHAPES, lambda part: ImageTokens(9, tokens), size)


def places(text: str, count: int, size: int | None = None) -> list[str]:
    given = {"image": [Image.new("RGB", (2, 2))] * count}
    prompt = read_prompt({"prompt": text, "multi_modal_data": given}, "<image>", images(size))
    return [part.text if isinstance(part, TextPart) else "*" for part in prompt.parts]


I = "<image>"  # noqa: E741


@pytest.mark.parametrize(
    ("text", "count", "size", "found"),
    [
        (I * 4 + "a", 1, None, ["*", "a"]),
        ("a" + I * 4 + "b" + I * 4 + "c", 2, None, ["a", "*", "b", "*", "c"]),
        (I * 8 + "a", 2, None, ["*", "*", "a"]),
        (I * 4 + "a", 4, None, ["*", "*", "*", "*", "a"]),
        (I * 3 + "a" + I, 4, None, ["*", "*", "*", "a", "*"]),
        (I * 6 + "a", 1, 6, ["*", "a"]),
        (I * 6 + I * 4 + "a", 2, 6, ["*", "*", "a"]),
        ("a", 2, None, ["*", "*", "a"]),
    ],
)
def test_which_placeholders_are_one_image(text: str, count: int, size: int | None, found: list[str]) -> None:
    assert places(text, count, size) == found


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (I * 3, 1),
        (I * 5, 1),
        (I * 2 + "a" + I * 2, 1),
        (I * 4 + I, 1),
        (I * 7, 2),
        (I * 12, 2),
        (I, 2),
        (I * 9, 3),
    ],
)
def test_other_numbers_of_placeholders_are_refused(text: str, count: int) -> None:
    with pytest.raises(InvalidRequest, match=f"{text.count(I)} placeholders of images .* and {count} images"):
        places(text, count)


def test_tokens_of_an_image_are_one_place() -> None:
    given = {"image": [Image.new("RGB", (2, 2))] * 2}
    for ids, found in (
        ([1, 9, 9, 9, 9, 2, 9, 9, 9, 9], [1, 9, 2, 9]),
        ([9, 2, 9], [9, 2, 9]),
        ([9, 2], [9, 2]),
        ([9] * 5, [9] * 5),
    ):
        prompt = read_prompt({"prompt_token_ids": ids, "multi_modal_data": given}, "<image>", images())
        assert prompt.token_ids == found


def test_prompts_and_their_data_as_arguments_of_their_own() -> None:
    one, two = ImagePixelData(1), ImagePixelData(2)
    assert prompts_with_data(["a"], None, None) == ["a"]
    assert prompts_with_data("a", None, one) == {"prompt": "a", "multi_modal_data": one}
    assert prompts_with_data(["a"], None, one) == [{"prompt": "a", "multi_modal_data": one}]
    assert prompts_with_data(["a", "b"], None, [one, two])[1] == {"prompt": "b", "multi_modal_data": two}
    assert prompts_with_data(None, [5, 6], None) == {"prompt_token_ids": [5, 6], "multi_modal_data": None}
    assert prompts_with_data(None, [[5], [6]], None)[1] == {"prompt_token_ids": [6], "multi_modal_data": None}
    assert prompts_with_data("a", [[5]], one)["prompt_token_ids"] == [5]
    for data in ([one], [one, two, one]):
        with pytest.raises(ValueError, match="one for each of the 2 prompts"):
            prompts_with_data(["a", "b"], None, data)
    with pytest.raises(ValueError, match="prompt_token_ids: give one for each of the 2 prompts"):
        prompts_with_data(["a", "b"], [[5]], None)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (ImagePixelData("a path"), ImageError, "it is a str; give a PIL image"),
        (ImageFeatureData(Image.new("RGB", (2, 2))), ImageError, "it is a Image; give"),
        (ImageFeatureData(torch.ones(1, 64, 99)), ImageError, r"\[64, 99\]; wanted: \[tokens, 160\]"),
        (ImagePixelData(torch.ones(2, 3, 4, 4)), ImageError, r"array of the shape \[2, 3, 4, 4\]; give"),
        ({"image": torch.full((4, 128), float("nan"))}, ImageError, "not finite"),
        ({"image": [np.ones((4, 128)), Image.new("RGB", (2, 2))]}, InvalidRequest, "images or embeddings, not both"),
        ({"image": {"image_embeds": 5}}, InvalidRequest, "image_embeds must be an array"),
        ({"image": {"image_embeds": np.ones((2, 4, 8)), "image_grid_thw": np.ones(3)}}, InvalidRequest, "each of 2"),
        ({"image": {"image_embeds": np.ones((4, 8)), "image_sizes": 5}}, InvalidRequest, "'image_sizes' is not"),
        (7, InvalidRequest, "must be a dict"),
    ],
)  # fmt: skip
def test_what_is_no_image_says_why(given: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        images().read(given)


def test_the_same_embeddings_in_another_arrangement_are_another_image() -> None:
    digests = {
        part.given.digest
        for grid in ([1, 2, 8], [1, 8, 2], None)
        for part in images().read(
            {"image": {"image_embeds": np.ones((4, 8)), "image_grid_thw": grid and np.array(grid)}}
        )
        if isinstance(part, EmbeddingsPart) and part.given is not None
    }
    assert len(digests) == 3


def test_what_tensors_become() -> None:
    reader = images()
    (part,) = reader.read({"image": {"image_embeds": torch.ones(1, 4, 8), "image_grid_thw": torch.tensor([[1, 4, 4]])}})
    assert isinstance(part, EmbeddingsPart)
    assert part.given is not None
    assert (part.given.rows.shape, part.given.grid, part.given.largest) == ((4, 8), (1, 4, 4), 1.0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    processor: Any = AutoImageProcessor.from_pretrained(SHAPES, backend="pil")
    (part,) = reader.read(ImagePixelData(processor(image, return_tensors="pt")["pixel_values"]))
    assert isinstance(part, ImagePart)
    assert part.given is not None
    assert part.given.tobytes() == image.tobytes(), "exactly what the processor was given"


def test_pixels_of_a_model_whose_processor_says_nothing(tmp_path: Path) -> None:
    reader = PromptImages(tmp_path, lambda part: ImageTokens(9, 4), None)
    with pytest.raises(ImageError, match=r"preprocessor_config\.json does not say"):
        reader.read(ImagePixelData(torch.ones(3, 4, 4)))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [9] * 3, "image_std": [9] * 3, "do_normalize": False, "rescale_factor": 1 / 255})
    )
    (part,) = PromptImages(tmp_path, lambda part: ImageTokens(9, 4), None).read(ImagePixelData(torch.ones(3, 4, 4)))
    assert isinstance(part, ImagePart)
    assert part.given is not None
    assert part.given.getpixel((0, 0)) == (255, 255, 255)
