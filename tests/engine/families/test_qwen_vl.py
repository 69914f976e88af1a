"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL on the embedded engine, against transformers' own code."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, PreTrainedTokenizerFast

from engine.errors import ModelLoadError, RequestRejected
from engine.families.preprocessor import GRID, PreparedImage
from engine.families.qwen2_vl import Qwen2VLPreprocessor
from engine.loader import load_preprocessor
from engine.messages import ImageInput, TensorData
from handlers.backends.image_options import contradictions
from handlers.errors import ImageError
from handlers.request import (
    ChatPrompt,
    Constraint,
    EmbeddingsPart,
    GenerationRequest,
    ImagePart,
    LoadedEmbeddings,
    LoadedImage,
    Message,
    RequestSampling,
    TextPart,
)
from properties.settings import Settings
from tests.support.engine_driver import Oracle, Prompt, load_engine, run_all
from tests.support.exactness import PromptMaker, check_random_load
from tests.support.likeness import check_two_ranks
from tests.support.model_front import learned
from tests.support.rolling import answer, check_stop_string, loaded, tokens
from tests.support.tiny_qwen_vl import END, FAMILIES, HIDDEN, IMAGE, START, inputs, make_qwen_vl

GREEDY = RequestSampling(temperature=0.0, max_tokens=16)
SIZES = ((1, 1), (30, 900), (900, 30), (60, 41), (129, 77), (200, 200), (28, 28), (3, 100))
"""(width, height): a point, 1:30 both ways, odd, larger than the limit, one token's side, smaller than a patch."""


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


IMAGES = [noise(*size) for size in SIZES] + [Image.new("RGB", (90, 60)), noise(60, 41, seed=1)]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    path = make_qwen_vl(tmp_path_factory.mktemp("models") / request.param, request.param)
    return path, Oracle(path, inputs)


def marked(*items: int | Image.Image) -> Prompt:
    """Each image between the marks that a template puts around it."""
    whole: list[int | Image.Image] = []
    for item in items:
        whole += [item] if isinstance(item, int) else [START, item, END]
    return Prompt(whole)


def random_prompts(most: int = 3) -> PromptMaker:
    def make(rng: random.Random, prefixes: list[list[int]]) -> Prompt:
        items: list[Any] = list(rng.choice(prefixes)) if rng.random() < 0.5 else []
        items += [rng.randrange(256) for _ in range(rng.randint(1, 70))]
        for _ in range(rng.choice([0, 1, 1, *range(2, most + 1)])):
            items.insert(rng.randint(0, len(items)), rng.choice(IMAGES))
        return marked(*items)

    return make


@pytest.mark.parametrize("seed", range(4))
def test_tokens_equal_generate_for_random_loads(model: tuple[Path, Oracle], seed: int) -> None:
    check_random_load(*model, seed, random_prompts(), max_model_len=300)


POINT, LONG, WIDE, ODD, _, LARGE, SMALL, THIN, BLACK, OTHER = IMAGES
TRAPS = [
    marked(1, 2, 3, ODD, 4, 5),
    marked(1, 2, 3, OTHER, 4, 5),
    marked(BLACK, 7),
    marked(LONG, WIDE, 8, 9),
    marked(ODD, ODD, 3),
    marked(7, LARGE),
    marked(POINT, THIN, SMALL, 5),
    Prompt([9, 8, 7]),
    Prompt([START, LARGE, 1, END, START, POINT, 2]),
]
"""The same text before two images, a black image, very long ones, the same twice, no text behind, none at all."""


@pytest.mark.parametrize("budget", [5, 11, 512])
def test_a_prompt_may_be_cut_anywhere_in_an_image(model: tuple[Path, Oracle], budget: int) -> None:
    """Twice in a row, so that the second time begins behind what is cached, in an image for some."""
    path, oracle = model
    engine = load_engine(path, max_num_batched_tokens=budget, max_num_seqs=4, block_size=4)
    want = [oracle.generate(prompt, 16, ignore_eos=True) for prompt in TRAPS]
    params = RequestSampling(temperature=0.0, max_tokens=16, ignore_eos=True)
    for _ in range(2):
        results = run_all(engine, [prompt.add(oracle.preprocessor, params) for prompt in TRAPS])
        assert [results[number].token_ids for number in range(len(TRAPS))] == want
    assert engine.pool.hits > 0


def test_an_image_may_be_the_end_of_a_prompt(model: tuple[Path, Oracle]) -> None:
    """What follows is behind the longer side on all axes, as `get_rope_index` has it. (`generate` counts on from each
    axis of the last row instead; the model's own forward, asked here, does not.)"""
    path, oracle = model
    for prompt in (Prompt([5, START, LONG]), Prompt([START, LARGE])):
        add = prompt.add(oracle.preprocessor, GREEDY)
        got = run_all(load_engine(path), [add])[0].token_ids
        ids = torch.tensor([add.token_ids])
        own = inputs(oracle.processor, prompt.images, ids)
        want: list[int] = []
        with torch.inference_mode():
            out = oracle.model(input_ids=ids, use_cache=True, **own)
            for _ in got:
                want.append(int(out.logits[0, -1].argmax()))
                out = oracle.model(
                    input_ids=torch.tensor([want[-1:]]), past_key_values=out.past_key_values, use_cache=True
                )
        assert got == want


def test_log_probabilities_are_those_of_the_model(model: tuple[Path, Oracle]) -> None:
    path, oracle = model
    params = RequestSampling(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=5, prompt_logprobs=0)
    adds = [prompt.add(oracle.preprocessor, params) for prompt in TRAPS]
    results = run_all(load_engine(path, max_num_batched_tokens=19), adds)
    for number, (prompt, add) in enumerate(zip(TRAPS, adds, strict=True)):
        result = results[number]
        ids = torch.tensor([add.token_ids + result.token_ids])
        own = inputs(oracle.processor, prompt.images, ids) if prompt.images else {}
        with torch.inference_mode():
            want = oracle.model(input_ids=ids, **own).logits[0].log_softmax(-1)
        prompt_entries = next(o.prompt_logprobs for o in result.outputs if o.prompt_logprobs is not None)
        entries = prompt_entries + [entry for o in result.outputs for entry in o.logprobs or []]
        assert len(entries) == ids.shape[1] - 1
        for row, entry in zip(want, entries, strict=False):
            expected = row[torch.tensor(entry.token_ids)]
            assert torch.allclose(torch.tensor(entry.logprobs), expected, atol=1e-4, rtol=0)


def test_positions_are_the_models_own(model: tuple[Path, Oracle]) -> None:
    _, oracle = model
    rng = random.Random(1)
    for _ in range(60):
        prompt = random_prompts(most=5)(rng, [[1, 2, 3]])
        add = prompt.add(oracle.preprocessor, GREEDY)
        if not prompt.images:
            assert add.positions is None
            assert add.position_delta == 0
            continue
        ids = torch.tensor([add.token_ids])
        own = inputs(oracle.processor, prompt.images, ids)
        want, delta = oracle.model.model.get_rope_index(
            ids, image_grid_thw=own[GRID], mm_token_type_ids=own["mm_token_type_ids"]
        )
        assert add.positions is not None
        np.testing.assert_array_equal(add.positions.unpack(), want[:, 0].numpy())
        assert add.position_delta == delta.item()


def test_two_ranks_give_the_same_tokens(model: tuple[Path, Oracle]) -> None:
    prompts = [marked(1, ODD, 2, LONG, 3)]
    check_two_ranks(*model, prompts, length=16, ignore_eos=False, max_num_batched_tokens=13)


def test_encoding_is_bounded_and_gives_the_same(model: tuple[Path, Oracle]) -> None:
    """The images have 16 to 104 patches each. The rows are also what the cache counts."""
    path, oracle = model
    engine = load_engine(path)
    images = [p for image in IMAGES for p in marked(image).add(oracle.preprocessor, GREEDY).images]
    given = [{name: torch.from_numpy(data.unpack()) for name, data in p.tensors.items()} for p in images]
    family = engine.runner.model
    with torch.inference_mode():
        together = family.encode(given)
        sizes: list[int] = []
        tower: Any = family.model.model.visual
        hook = tower.register_forward_pre_hook(lambda _, patches: sizes.append(len(patches[0])))
        family.encode_patches = 90
        apart = family.encode(given)
        hook.remove()
    assert sum(sizes) == sum(len(one["pixel_values"]) for one in given)
    assert all(size <= 90 or size in {len(one["pixel_values"]) for one in given} for size in sizes)
    assert len(sizes) < len(given)
    for one, other, image in zip(together, apart, images, strict=True):
        assert one.shape == (image.length, family.row_size)
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    run_all(engine, [marked(1, ODD, 2).add(oracle.preprocessor, GREEDY)])
    (odd,) = marked(ODD).add(oracle.preprocessor, GREEDY).images
    assert engine.runner.encoder_cache.used_bytes == odd.length * family.row_size * 4


# -- images ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(our preprocessor, transformers' processor): patches of 14 and 16 pixels, two normalisations."""
    path = make_qwen_vl(tmp_path_factory.mktemp("models") / "tiny", request.param)
    load: Any = AutoImageProcessor.from_pretrained
    return load_preprocessor(str(path)), load(path)


def _both_frames(image: PreparedImage) -> np.ndarray:
    """[patches, channels x frames x pixels], as the processor has them."""
    patches = image.tensors["pixel_values"]
    return np.repeat(patches.reshape(len(patches), 3, 1, -1), 2, axis=2).reshape(len(patches), -1)


sides = st.one_of(st.integers(1, 40), st.integers(40, 400))


@settings(max_examples=60, deadline=None)
@given(st.tuples(sides, sides).filter(lambda size: max(size) <= 200 * min(size)), st.integers(0, 2**32 - 1))
def test_pixels_and_counts_equal_the_processors(prepared: tuple[Any, Any], size: tuple[int, int], seed: int) -> None:
    ours, theirs = prepared
    assert ours.metadata.recipe is not None
    image = noise(*size, seed=seed)
    want = theirs(images=image, return_tensors="np")
    got = ours.prepare(image)
    np.testing.assert_array_equal(_both_frames(got), want["pixel_values"])
    np.testing.assert_array_equal(got.tensors[GRID], want[GRID][0])
    assert got.tensors[GRID].dtype == np.int64
    assert got.token_ids == [IMAGE] * (int(want[GRID].prod()) // 4)
    assert got.is_embed is None


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_counts_of_large_images_equal_the_processors(prepared: tuple[Any, Any], width: int, height: int) -> None:
    ours, theirs = prepared
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(RequestRejected, match=f"it is {width}x{height} pixels"):
            ours.layout(width, height)
    else:
        patches = theirs.get_number_of_image_patches(height, width)
        assert len(ours.layout(width, height).token_ids) == patches // 4


@pytest.mark.parametrize(
    ("size", "count"),
    [((224, 224), 64), ((1024, 768), 37 * 27), ((20, 20), 4), ((6000, 4000), 156 * 104), ((50, 2000), 142)],
)
def test_tokens_of_an_image_with_the_hubs_limits(tmp_path: Path, size: tuple[int, int], count: int) -> None:
    """By hand: sides in units of 28 pixels, rounded; 3,136 to 12,845,056 pixels."""
    path = make_qwen_vl(tmp_path)
    preprocessor = load_preprocessor(str(path), {"min_pixels": 3136, "max_pixels": 12845056})
    assert preprocessor is not None
    assert len(preprocessor.layout(*size).token_ids) == count


@pytest.mark.parametrize("kind", FAMILIES)
def test_limits_on_pixels_that_the_operator_sets_are_obeyed(tmp_path: Path, kind: str) -> None:
    path = make_qwen_vl(tmp_path, kind)
    unit = 32 if kind == "qwen3_vl" else 28
    limits = {"min_pixels": 16 * unit**2, "max_pixels": 20 * unit**2}
    usual, limited = load_preprocessor(str(path)), load_preprocessor(str(path), limits)
    sized = {"size": {"shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]}}
    same = load_preprocessor(str(path), sized)
    assert same is not None
    assert (same.metadata.min_pixels, same.metadata.max_pixels) == (
        limits["min_pixels"],
        limits["max_pixels"],
    )
    with pytest.raises(ModelLoadError, match="size has 'height'"):
        load_preprocessor(str(path), {"size": {"height": 28, "width": 28}})
    assert usual is not None
    assert limited is not None
    assert limited.fingerprint != usual.fingerprint
    assert limited.to_bytes() is not None
    load: Any = AutoImageProcessor.from_pretrained
    theirs = load(path, **limits)
    for size, count in (((10, 10), 16), ((300, 300), 16), ((200, 160), 20)):
        image = noise(*size)
        got = limited.prepare(image)
        assert len(got.token_ids) == count
        want = theirs(images=image, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(_both_frames(got), want)
    for wrong in ({"min_pixels": 30000, "max_pixels": 20000}, {"min_pixels": 0}, {"max_pixels": -1}):
        with pytest.raises(ModelLoadError, match="min_pixels is"):
            load_preprocessor(str(path), wrong)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="their joint processor needs torchvision")
@pytest.mark.parametrize("kind", FAMILIES)
def test_prompts_equal_the_joint_processors(tmp_path: Path, kind: str) -> None:
    path = make_qwen_vl(tmp_path, kind)
    load: Any = AutoProcessor.from_pretrained
    theirs, ours = load(path), load_preprocessor(str(path))
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path)
    assert ours is not None
    rng = random.Random(2)
    for _ in range(60):
        images = [
            noise(rng.choice([1, 9, 50, 120, 500]), rng.choice([5, 30, 110, 200])) for _ in range(rng.randint(1, 4))
        ]
        text = "".join(rng.choice(["a", "\n", " ", "é", ""]) + "<|image_pad|>" for _ in images) + "?"
        want = theirs(text=[text], images=images)["input_ids"][0]
        waiting = iter(images)
        got: list[int] = []
        for token in tokenizer(text).input_ids:
            got += ours.layout(*next(waiting).size).token_ids if token == IMAGE else [token]
        assert got == list(want)


def test_the_front_prepares_without_torch(tmp_path: Path) -> None:
    path = make_qwen_vl(tmp_path, "qwen2_5_vl")
    preprocessor = load_preprocessor(str(path))
    assert preprocessor is not None
    assert preprocessor.to_bytes() is not None
    if find_spec("torchvision") is None:
        found = learned(path)
        assert found["heavy"] == []
        assert found["fingerprint"] == preprocessor.fingerprint.hex()


def test_the_shape_of_an_image_is_no_property_of_the_model(tmp_path: Path) -> None:
    """What old versions of vLLM wanted to be told is right whatever it is."""
    path = make_qwen_vl(tmp_path)
    told = Settings(image_input_shape=(1, 3, 336, 336), image_token_id=IMAGE)
    assert contradictions(told, path, load_preprocessor(str(path))) == []


def test_a_processor_that_does_not_resize_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="do_resize"):
        load_preprocessor(str(make_qwen_vl(tmp_path)), {"do_resize": False})


# -- through the backend -----------------------------------------------------------------------------------------


def asked(
    *content: str | Image.Image | LoadedEmbeddings, sampling: dict[str, Any] | None = None, **fields: Any
) -> GenerationRequest:
    parts: list[Any] = []
    for item in content:
        if isinstance(item, str):
            parts.append(TextPart(item))
        elif isinstance(item, Image.Image):
            parts.append(ImagePart("data:", loaded=LoadedImage(item, item.tobytes()[:64] + repr(item.size).encode())))
        else:
            parts.append(EmbeddingsPart("", loaded=item))
    params = RequestSampling(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **(sampling or {})})
    return GenerationRequest("id", ChatPrompt([Message("user", parts)]), params, **fields)


@asynccontextmanager
async def backend_of(kind: str, path: Path) -> AsyncIterator[Any]:
    async with loaded(make_qwen_vl(path, kind)) as backend:
        yield backend


def test_what_a_backend_offers_works_with_deepstack(tmp_path: Path) -> None:
    """n, stop strings, grammars, embeddings in place of images and refusals; the other two families are asked the
    same over HTTP."""
    path = make_qwen_vl(tmp_path, "qwen3_vl")
    oracle = Oracle(path, inputs)
    assert oracle.preprocessor is not None
    prepared = oracle.preprocessor.prepare(ODD)
    family: Any = load_engine(path).runner.model
    with torch.inference_mode():
        (rows,) = family.encode([{name: torch.from_numpy(a) for name, a in prepared.tensors.items()}])
    frames, height, width = (int(side) for side in prepared.tensors[GRID])
    embeddings = LoadedEmbeddings(rows.numpy(), 0.0, (frames, height, width), b"rows" * 8)
    assert rows.shape[1] == 4 * HIDDEN

    async def scenario() -> None:
        async with loaded(path) as backend:
            assert backend.capabilities.image_placeholder == "<|vision_start|><|image_pad|><|vision_end|>"
            plain = await answer(backend, asked("look ", ODD, " there"))
            several = await answer(backend, asked("look ", ODD, " there", n=2))
            assert [tokens(several, index) for index in range(2)] == [tokens(plain)] * 2
            generation = await backend.generate(asked("look ", ODD, " there"))
            prompt_ids = generation.stats.prompt_token_ids
            await generation.aclose()
            at = prompt_ids.index(IMAGE)
            before, behind = prompt_ids[:at], prompt_ids[at + prompt_ids.count(IMAGE) :]
            assert (before[-1], behind[0]) == (START, END)
            assert tokens(plain) == oracle.generate(Prompt([*before, ODD, *behind]), 12, ignore_eos=True)

            assert tokens(await answer(backend, asked("look ", embeddings, " there"))) == tokens(plain)
            other = LoadedEmbeddings(rows.numpy(), 0.0, (1, width, height), b"turn" * 8)
            if width != height:
                assert tokens(await answer(backend, asked("look ", other, " there"))) != tokens(plain)
            for wrong, reason in (
                (LoadedEmbeddings(rows.numpy(), 0.0, None, b"x" * 32), "wants image_grid_thw"),
                (LoadedEmbeddings(rows[:, :HIDDEN].numpy(), 0.0, (1, height, width), b"x" * 32), "512"),
            ):
                with pytest.raises(ImageError, match=reason):
                    await backend.generate(asked(wrong))
            with pytest.raises(ImageError, match=r"image 1: it is 402x2 pixels.*at most 200 times") as caught:
                await backend.generate(asked(ODD, noise(402, 2)))
            assert caught.value.status == 400

            await check_stop_string(backend, asked, "look ", ODD, " there")

            held = Constraint("grammar", 'start: /[a-z]{3}/ (<|image_pad|> | <|video_pad|> | "!")', "grammar")
            drawn = {"temperature": 1.0, "max_tokens": 8, "seed": 1, "ignore_eos": False}
            request = asked("look ", ODD, constraint=held, n=8, sampling=drawn)
            chosen = await answer(backend, request)
            assert IMAGE not in {token for delta in chosen for token in delta.token_ids}

    asyncio.run(scenario())


def test_penalties_count_the_tokens_of_images(model: tuple[Path, Oracle]) -> None:
    """Qwen2.5-VL's generation_config.json asks for one, with greedy answers, too."""
    path, oracle = model
    params = RequestSampling(temperature=0.0, max_tokens=24, repetition_penalty=1.3)
    prompt = marked(1, 2, ODD, 3)
    got = run_all(load_engine(path), [prompt.add(oracle.preprocessor, params)])[0].token_ids
    config: Any = oracle.model.generation_config
    config.repetition_penalty = 1.3
    try:
        assert got == oracle.generate(prompt, 24)
    finally:
        config.repetition_penalty = None
    assert got != oracle.generate(prompt, 24)


def test_positions_come_from_the_grid_alone() -> None:
    """Two images of six tokens each, 2x3 and 6x1: by hand."""
    metadata: Any = type("Metadata", (), {"merge": 2})
    preprocessor = Qwen2VLPreprocessor(metadata)
    grids = [np.array([1, 4, 6]), np.array([1, 12, 2])]
    images = [
        ImageInput(b"", offset, 6, {GRID: TensorData.pack(grid)}) for offset, grid in zip((1, 8), grids, strict=True)
    ]
    positions, delta = preprocessor.positions(16, images)
    assert positions is not None
    assert positions.tolist() == [
        [0, *[1] * 6, 4, *[5] * 6, 11, 12],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12],
        [0, 1, 2, 3, 1, 2, 3, 4, *[5] * 6, 11, 12],
    ]
    assert delta == -3
