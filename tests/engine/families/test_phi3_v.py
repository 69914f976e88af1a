"""Phi-3 Vision on the embedded engine, beside a plain reference: one request at a time, no cache, loops over tiles."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3ForCausalLM, PretrainedConfig

from engine.errors import ModelLoadError
from engine.families.phi3_v import Phi3VPreprocessor, classes
from engine.families.preprocessor import PlaceholderText
from engine.loader import load_preprocessor, read_config
from engine.messages import EMBEDDINGS, TensorData
from engine.sampling_params import SamplingParams
from handlers import LLM
from handlers import SamplingParams as OfflineParams
from handlers.prompts.renderer import PromptRenderer
from handlers.request import ChatPrompt, Constraint, ImagePart, Message, TextPart
from tests.support.checked import CPU, report
from tests.support.engine_driver import EOS, Oracle, Prompt, load_engine, run_all
from tests.support.exactness import check_logprobs, check_random_load, image_of, prompts_with
from tests.support.likeness import check_two_ranks
from tests.support.model_front import HEAVY, learned
from tests.support.models import make_text_model, make_tokenizer
from tests.support.phi3_v_code import prepared
from tests.support.rolling import answer, check_stop_string, loaded, request, tokens
from tests.support.tiny_phi3_v import LIMIT, MOST, TEMPLATE, TILE, VISION, begin_with_bos, make_phi3_v

IMAGE = 264
BLACK = Image.new("RGB", (40, 60))
SIZES = ((30, 40), (120, 4), (4, 120), (1, 1), (90, 60), (200, 190))
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


class Reference(Oracle):
    """What the checkpoint's own code computes, written down plainly, on the weights as they are stored."""

    def __init__(self, path: Path) -> None:
        self.preprocessor = load_preprocessor(str(path))
        weights = load_file(path / "model.safetensors")
        stored, _ = PretrainedConfig.get_config_dict(path)
        stored["rope_scaling"]["type"] = "longrope"
        text = Phi3Config(**{k: v for k, v in stored.items() if k not in ("model_type", "vision_config")})
        self.model = Phi3ForCausalLM(text).eval()
        self.model.load_state_dict({k: v for k, v in weights.items() if "vision_embed" not in k})
        self._tower = CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()
        begin = "model.vision_embed_tokens."
        clip = begin + "img_processor.vision_model."
        self._tower.load_state_dict({k.removeprefix(clip): v for k, v in weights.items() if k.startswith(clip)})
        self._own = {k.removeprefix(begin): v for k, v in weights.items() if k.startswith(begin)}

    @torch.inference_mode()
    def rows(self, image: Image.Image) -> torch.Tensor:
        tiles, (down, across) = prepared(image, MOST, TILE)
        patches = self._tower(tiles, output_hidden_states=True).hidden_states[-2][:, 1:]
        side = TILE // VISION["patch_size"]
        rows: list[torch.Tensor] = []

        def line(tiles: torch.Tensor, top: int) -> None:
            for tile in tiles:
                grid = tile.view(side, side, -1)
                for left in range(0, side, 2):
                    rows.append(torch.cat([grid[top + y, left + x] for y, x in ((0, 0), (0, 1), (1, 0), (1, 1))]))
            rows.append(self._own["sub_GN"].flatten())

        for row in range(down):
            for top in range(0, side, 2):
                line(patches[1 + row * across : 1 + (row + 1) * across], top)
        rows.append(self._own["glb_GN"].flatten())
        for top in range(0, side, 2):
            line(patches[:1], top)
        first, second = (
            (self._own[f"img_projection.{n}.weight"], self._own[f"img_projection.{n}.bias"]) for n in (0, 2)
        )
        hidden = torch.nn.functional.gelu(torch.stack(rows) @ first[0].T + first[1])
        return hidden @ second[0].T + second[1]

    @torch.inference_mode()
    def _embedded(self, prompt: Prompt) -> torch.Tensor:
        table = self.model.get_input_embeddings()
        parts = [table(torch.tensor([item])) if isinstance(item, int) else self.rows(item) for item in prompt.items]
        return torch.cat(parts)[None]

    @torch.inference_mode()
    def generate(self, prompt: Prompt, max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
        embedded, answer = self._embedded(prompt), []
        while len(answer) < max_tokens and (ignore_eos or not set(answer) & set(EOS)):
            logits = self.model(inputs_embeds=embedded, use_cache=False).logits[0, -1]
            answer.append(int(logits.argmax()))
            embedded = torch.cat([embedded, self.model.get_input_embeddings()(torch.tensor([answer[-1:]]))], dim=1)
        return answer

    @torch.inference_mode()
    def logits(self, prompt: Prompt) -> torch.Tensor:
        logits: torch.Tensor = self.model(inputs_embeds=self._embedded(prompt), use_cache=False).logits[0]
        return logits


def images() -> list[Image.Image]:
    return [*(image_of(*size, seed) for seed, size in enumerate(SIZES)), BLACK]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phi3_v(tmp_path_factory.mktemp("models") / "phi3_v")


@pytest.fixture(scope="module")
def oracle(model: Path) -> Reference:
    return Reference(model)


@pytest.mark.parametrize("seed", range(6))
def test_tokens_equal_the_reference_for_random_loads(model: Path, oracle: Reference, seed: int) -> None:
    check_random_load(model, oracle, seed, prompts_with(images()), max_model_len=400)


@pytest.mark.parametrize(
    "items",
    [
        [5, BLACK, 6],
        [image_of(120, 4), 7],
        [1, 2, 3, image_of(4, 120)],
        [1, image_of(30, 40), image_of(90, 20), 2],
        [1, 2, 3, 4],
    ],
    ids=["black", "30 to 1", "1 to 30 at the end", "two in a row", "none"],
)
def test_log_probabilities_equal_the_reference_wherever_a_prompt_is_cut(
    model: Path, oracle: Reference, items: list[Any]
) -> None:
    prompt = Prompt(items)
    check_logprobs(model, oracle, prompt)
    (got,) = run_all(load_engine(model, max_num_batched_tokens=256), [prompt.add(oracle.preprocessor, GREEDY)]).values()
    assert got.token_ids == oracle.generate(prompt, 16, ignore_eos=True)


def test_the_same_text_before_two_images_shares_no_more_than_the_text(model: Path, oracle: Reference) -> None:
    engine = load_engine(model, block_size=4)
    prompts = [Prompt([*range(40), image_of(40, 40, seed), 9, 8]) for seed in (1, 2)]
    got = [run_all(engine, [p.add(oracle.preprocessor, GREEDY)])[0] for p in prompts]
    assert got[1].outputs[0].cached_tokens == 40
    want = [oracle.generate(prompt, 16, ignore_eos=True) for prompt in prompts]
    assert want[0] != want[1]
    assert [result.token_ids for result in got] == want


def test_an_answer_that_passes_the_original_length_goes_on_with_the_long_frequencies(
    model: Path, oracle: Reference
) -> None:
    """All its tokens have them, as for the reference, which has no cache; an image is not encoded again for it."""
    image = image_of(30, 40)
    assert oracle.preprocessor is not None
    rows = len(oracle.preprocessor.prepare(image).token_ids)
    prompt = Prompt([*range(LIMIT - rows - 4), image, 7])
    (got,) = run_all(load_engine(model), [prompt.add(oracle.preprocessor, GREEDY)]).values()
    assert got.token_ids == oracle.generate(prompt, 16, ignore_eos=True)


edges = st.integers(1, 260)


@pytest.fixture(scope="module", params=[1, 4, 6, 16])
def pixels(request: pytest.FixtureRequest, model: Path) -> Phi3VPreprocessor:
    made = load_preprocessor(str(model), {"num_crops": request.param})
    assert isinstance(made, Phi3VPreprocessor)
    assert made.to_bytes() is not None, "the front must do without transformers"
    return made


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.tuples(edges, edges), st.sampled_from([(1, 1), (900, 30), (30, 900), (1200, 1), (1, 1200)])))
def test_pixels_and_tiles_equal_the_checkpoints_own(pixels: Phi3VPreprocessor, size: tuple[int, int]) -> None:
    image = image_of(*size, seed=sum(size))
    got = pixels.prepare(image)
    want, (down, across) = prepared(image, pixels.metadata.most, TILE)
    assert got.tensors["grid"].tolist() == [down, across]
    np.testing.assert_array_equal(got.tensors["pixel_values"][1:], want[1:].numpy())
    # torch adds up in another order on some machines
    np.testing.assert_allclose(got.tensors["pixel_values"][0], want[0].numpy(), rtol=0, atol=1e-6)
    lines = TILE // VISION["patch_size"] // 2
    count = (down * across + 1) * lines * lines + 1 + (down + 1) * lines
    assert got.token_ids == [IMAGE] * count


def test_the_published_model_takes_as_many_tokens_as_its_processor_says(tmp_path: Path) -> None:
    """Without vision_config, CLIP ViT-L/14 of 336 pixels. The numbers are those of vLLM's test of this model."""
    path = make_phi3_v(tmp_path)
    stored = json.loads((path / "config.json").read_text())
    del stored["vision_config"]
    stored["img_processor"]["image_dim_out"] = 1024
    (path / "config.json").write_text(json.dumps(stored))
    for most, tokens_of in ((4, 757), (16, 1921)):
        made = load_preprocessor(str(path), {"num_crops": most})
        assert made is not None
        assert len(made.layout(1300, 876).token_ids) == tokens_of
    image = image_of(700, 300)
    want, _ = prepared(image, 16, 336)
    np.testing.assert_allclose(made.prepare(image).tensors["pixel_values"], want.numpy(), rtol=0, atol=1e-6)


words = st.sampled_from(["", "\n", " ", "What", " is it?\n", "a b"])


@settings(max_examples=60, deadline=None)
@given(st.lists(words, min_size=1, max_size=4), st.booleans(), st.booleans())
def test_prompts_are_tokenised_as_the_checkpoints_processor_does(texts: list[str], bos: bool, first: bool) -> None:
    """first: a tokenizer that begins each prompt with a space, as Llama's does."""
    tokenizer = make_tokenizer(TEMPLATE, more=("<|image|>",))
    if bos:
        begin_with_bos(tokenizer)
    if first:
        space = pre_tokenizers.Metaspace(replacement="Ġ", prepend_scheme="first", split=False)
        bytes_of = tokenizer.backend_tokenizer.pre_tokenizer
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([space, bytes_of])
    apart = PlaceholderText("<|image|>", texts_apart=True)
    renderer = PromptRenderer(tokenizer, TEMPLATE, image_token="<|image|>", written=apart)
    parts: list[Any] = [TextPart(texts[0])]
    for text in texts[1:]:
        parts += [ImagePart("data:"), TextPart(text)]
    got = renderer.render(ChatPrompt([Message("user", parts)]), spans=True)
    lines = ["\n"] * (len(texts) - 1)
    beginnings, ends = ["<|user|>\n", *lines], [*lines, "<|end|>\n<|assistant|>\n"]
    want = [tokenizer(b + text + e).input_ids for b, text, e in zip(beginnings, texts, ends, strict=True)]
    assert got.token_ids == [*want[0], *(token for ids in want[1:] for token in (IMAGE, *ids))]
    assert got.spans is not None
    for token, (start, stop) in zip(got.token_ids, got.spans, strict=True):
        if token >= 256:
            shown = tokenizer.convert_ids_to_tokens(token)
            assert got.text[start:stop] == shown or (token, start, stop) == (256, 0, 0)


def test_two_ranks_give_the_same_tokens(model: Path, oracle: Reference) -> None:
    prompts = [Prompt([1, 2, 3]), Prompt([9, image_of(50, 40), 4]), Prompt([image_of(4, 90), 7, BLACK, 8])]
    check_two_ranks(model, oracle, prompts, length=16)


@pytest.mark.parametrize(
    "names", [("vision_embed_tokens.wte",), ("vision_embed_tokens.wte", "embed_tokens")], ids=["other", "both"]
)
def test_the_embeddings_may_have_either_of_their_names(
    tmp_path: Path, oracle: Reference, names: tuple[str, ...]
) -> None:
    path = make_phi3_v(tmp_path, names=names)
    prompt = Prompt([5, image_of(30, 40), 6])
    (got,) = run_all(load_engine(path), [prompt.add(oracle.preprocessor, GREEDY)]).values()
    assert got.token_ids == oracle.generate(prompt, 16, ignore_eos=True)


def test_rows_in_place_of_an_image_give_the_same(model: Path, oracle: Reference) -> None:
    image = image_of(30, 40)
    add = Prompt([5, image, 6]).add(oracle.preprocessor, GREEDY)
    (want,) = run_all(load_engine(model), [add]).values()
    add.images[0].tensors = {EMBEDDINGS: TensorData.pack(oracle.rows(image).numpy())}
    (got,) = run_all(load_engine(model), [add]).values()
    assert got.token_ids == want.token_ids


def test_the_front_needs_no_torch(model: Path) -> None:
    assert learned(model)["heavy"] == HEAVY


@pytest.mark.parametrize("make", [make_phi3_v, lambda path: make_text_model(path, "phi3")], ids=["phi3_v", "phi3"])
def test_the_code_of_the_checkpoint_is_not_run(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    stored = json.loads((path / "config.json").read_text())
    stored["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (path / "config.json").write_text(json.dumps(stored))
    for name in ("own", "configuration_phi3_v", "modeling_phi3_v", "image_processing_phi3_v", "processing_phi3_v"):
        (path / f"{name}.py").write_text("raise SystemExit('it was run')")
    assert read_config(str(path)).model_type == stored["model_type"]
    load_engine(path)
    load_preprocessor(str(path))


def test_lmi_check_estimates_it(model: Path) -> None:
    found = report(model, CPU)
    assert found["errors"] == []
    assert found["memory"]["cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 2


def test_chats_several_answers_stop_strings_and_grammars(model: Path, oracle: Reference) -> None:
    async def scenario() -> None:
        async with loaded(model) as backend:
            asked = request(1, "what", 2, " is it?", n=2)
            shown = [part.loaded.image for part in asked.images() if part.loaded is not None]
            generation = await backend.generate(asked)
            deltas = [delta async for delta in generation]
            tokenizer = AutoTokenizer.from_pretrained(model)
            first, *rest = (
                tokenizer(text).input_ids for text in ("<|user|>\n", "\nwhat\n", "\n is it?<|end|>\n<|assistant|>\n")
            )
            prompt = Prompt([*first, shown[0], *rest[0], shown[1], *rest[1]])
            assert oracle.preprocessor is not None
            expected = prompt.add(oracle.preprocessor, GREEDY).token_ids
            assert generation.stats.prompt_token_ids == expected
            want = oracle.generate(prompt, 12, ignore_eos=True)
            assert [tokens(deltas, index) for index in range(2)] == [want, want]

            await check_stop_string(backend, request, 1, "what", 2, " is it?")

            biased = {"logit_bias": {IMAGE: 90.0}}
            free = await answer(backend, request(1, sampling=biased))
            assert set(tokens(free)) == {IMAGE}
            any_text = Constraint("regex", r"(.|\n)*")
            held = await answer(backend, request(1, sampling=biased, constraint=any_text))
            assert IMAGE not in tokens(held)

    asyncio.run(scenario())


def test_the_snippet_of_vllms_page(model: Path, oracle: Reference) -> None:
    """Its prompt has the placeholders as the checkpoint's processor knows them, numbered from 1."""
    first, second = image_of(40, 30), image_of(30, 70)
    prompt = "<|user|>\n<|image_1|>\n<|image_2|>\nWhat?<|end|>\n<|assistant|>\n"
    greedy = OfflineParams(temperature=0, max_tokens=10, ignore_eos=True)
    with LLM(str(model), dtype="float32", limit_mm_per_prompt={"image": 2}) as llm:
        (output,) = llm.generate(
            {"prompt": prompt, "multi_modal_data": {"image": [first, second]}}, greedy, use_tqdm=False
        )
    tokenizer, items = AutoTokenizer.from_pretrained(model), []
    waiting = iter((first, second))
    for text in re.split(r"<\|image_\d\|>", prompt):
        items += [*tokenizer(text).input_ids, *([shown] if (shown := next(waiting, None)) else [])]
    want = oracle.generate(Prompt(items), 10, ignore_eos=True)
    assert list(output.outputs[0].token_ids) == want


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"embd_layer": {"hd_transform_order": "glb_sub"}}, "hd_transform_order of this Phi-3 Vision is 'glb_sub'"),
        ({"img_processor": {"type_feature": "cls_patch"}}, "'cls_patch'; supported: 'patch'"),
        ({"img_processor": {"image_dim_out": 7}}, "image_dim_out of this Phi-3 Vision is 7"),
        ({"img_processor": {"layer_idx": -5}}, "layer_idx of this Phi-3 Vision is -5, but its tower has 3 layers"),
        ({"vision_config": {"image_size": 30}}, "not an even number of patches"),
    ],
)
def test_what_is_not_served_is_said_before_loading(
    tmp_path: Path, changed: dict[str, dict[str, Any]], message: str
) -> None:
    file = make_phi3_v(tmp_path) / "config.json"
    stored = json.loads(file.read_text())
    for name, fields in changed.items():
        stored[name] |= fields
    file.write_text(json.dumps(stored))
    with pytest.raises(ModelLoadError, match=message):
        read_config(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read"), ('{"num_crops": 0}', "num_crops of its image processor is 0")]
)
def test_an_image_processor_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    (make_phi3_v(tmp_path) / "preprocessor_config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=message):
        load_preprocessor(str(tmp_path))


def test_vllm_puts_the_rows_of_tiles_together_alike() -> None:
    """On random features, of the only size that its code takes."""
    phi3v = pytest.importorskip("vllm.model_executor.models.phi3v", reason="vLLM is not installed")
    torch.manual_seed(0)
    vision = {
        "hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 1, "image_size": 336, "patch_size": 14,
    }  # fmt: skip
    configuration, architecture = classes()
    small = {"vocab_size": 300, "pad_token_id": 0, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    ours: Any = architecture(configuration(vision_config=vision, **small)).model.vision_embed_tokens
    for parameter in (ours.sub_GN, ours.glb_GN):
        torch.nn.init.normal_(parameter)
    theirs = phi3v.Phi3HDImageEmbedding.__new__(phi3v.Phi3HDImageEmbedding)
    torch.nn.Module.__init__(theirs)
    theirs.image_dim_out, theirs.hd_transform_order = 1024, "sub_glb"
    theirs.sub_GN, theirs.glb_GN, theirs.img_projection = ours.sub_GN, ours.glb_GN, ours.img_projection
    for down, across in ((1, 1), (2, 3), (4, 1)):
        features = torch.randn(1 + down * across, 576, 1024)
        (want,) = theirs.hd_feature_transform(features[None], torch.tensor([[336 * down, 336 * across]]))
        torch.testing.assert_close(ours(features, down, across), want)
