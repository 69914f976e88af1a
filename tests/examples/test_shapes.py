"""The example model: its world, its exact answers, its files, and how well the committed weights answer."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.shapes import SHAPES

sys.path.insert(0, str(SHAPES))

import questions
import tokenizer
import world

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import evaluate  # noqa: E402
import network  # noqa: E402
import pictures  # noqa: E402

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 128, 0)


def scene(*shapes: tuple[str, str, world.RGB, float], width: int = 300, height: int = 120) -> world.Scene:
    """Return a white scene with shapes given as kind, colour, levels and the middle's place across."""
    rng = random.Random(0)
    made = [
        world.make_shape(kind, color, rgb, (across, height / 2), 36.0, 0.0, rng) for kind, color, rgb, across in shapes
    ]
    return world.Scene(width, height, "white", (255, 255, 255), tuple(sorted(made, key=lambda s: s.x)))


TWO = scene(("square", "blue", BLUE, 220.0), ("star", "orange", (255, 165, 0), 60.0))
THREE = scene(("circle", "red", RED, 50.0), ("square", "blue", BLUE, 150.0), ("star", "green", GREEN, 250.0))


def test_answers_for_scenes_made_by_hand() -> None:
    assert questions.what(TWO) == "an orange star and a blue square"
    assert questions.what(THREE) == "a red circle and a blue square and a green star"
    assert questions.count(TWO) == "two"
    assert questions.color_of(TWO, "square") == "blue"
    assert questions.its_color(TWO) == "orange and blue"
    one = scene(("circle", "red", RED, 50.0))
    assert questions.as_json(one) == '{"shapes": [{"color": "red", "shape": "circle"}]}'
    assert questions.what(replace(one, shapes=(), background="orange")) == "an orange background"


def test_a_follow_up_is_about_the_picture_spoken_about_last() -> None:
    rng = random.Random(0)
    talk = questions.Talk([TWO, THREE], shown=[0, 1], focus=0, last="nth image")
    told = dict(filter(None, (talk.ask("follow-up", rng) for _ in range(60))))
    assert told["And its color?"] == "orange and blue"
    assert talk.ask("what", rng) is not None
    assert talk.focus == 1
    assert dict([talk.ask("count", rng) or ("", "")]).popitem()[1] == "three"


def test_without_a_picture_there_is_nothing_to_see() -> None:
    talk = questions.converse([], 1, random.Random(1), plain=True)
    assert talk.messages[-1]["content"] == "I see no image."


def test_conversations_show_every_picture_and_name_every_question() -> None:
    rng = random.Random(2)
    for _ in range(200):
        number = rng.randint(0, 4)
        talk = questions.converse([world.sample_scene(rng) for _ in range(number)], rng.randint(1, 6), rng)
        parts = [p for m in talk.messages if isinstance(m["content"], list) for p in m["content"]]
        assert sum(part["type"] == "image" for part in parts) == number == len(talk.pictures)
        assert len(talk.kinds) == sum(m["role"] == "assistant" for m in talk.messages)
        assert talk.messages[-1]["role"] == "assistant"


def test_scenes_are_seeded_and_nothing_hides() -> None:
    scenes = [world.sample_scene(random.Random(seed)) for seed in range(60)]
    assert scenes == [world.sample_scene(random.Random(seed)) for seed in range(60)]
    for made in scenes:
        assert list(made.shapes) == sorted(made.shapes, key=lambda shape: shape.x)
        for shape in made.shapes:
            assert shape.color != made.background
            assert world.contrast(shape.rgb, made.ground) >= world.MIN_CONTRAST
            left, top, right, bottom = shape.box
            assert left >= 0
            assert top >= 0
            assert right <= made.width
            assert bottom <= made.height


@pytest.mark.parametrize("seed", range(12))
def test_renderers_agree_about_what_is_where(seed: int) -> None:
    plain = replace(world.sample_scene(random.Random(seed)), finish=world.Finish())
    drawn = [
        np.asarray(world.draw(replace(plain, finish=world.Finish(renderer=name, supersample=k))), np.int64)
        for name in world.RENDERERS
        for k in (1, 3)
    ]
    for other in drawn[1:]:
        differs = np.abs(drawn[0] - other).max(axis=-1) > 128
        # Only edges may differ: two pixels' width of every shape's outline at most.
        edge = sum(16 * shape.radius for shape in plain.shapes)
        assert differs.sum() <= edge


def test_patch_labels_say_what_is_where() -> None:
    labels = world.patch_labels(TWO, 8)
    middle = lambda across: 4 * 8 + int(across / 300 * 8)  # noqa: E731
    assert labels.kind[middle(60)] == world.KINDS.index("star") + 1
    assert labels.color[middle(220)] == world.COLORS.index("blue") + 1
    assert labels.owner[middle(140)] == 0
    assert labels.corners.sum(axis=0).tolist() == [4 + 5, 5]
    assert labels.mask[middle(220)].all()


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_the_tokenizer_round_trips_any_text(text: str) -> None:
    made = tokenizer.load()
    if not any(special in text for special in tokenizer.SPECIAL):
        assert made.decode(made.encode(text).ids, skip_special_tokens=False) == text


def test_words_of_the_world_are_single_tokens() -> None:
    for word in (*world.KINDS, *world.COLORS):
        assert len(tokenizer.encode(" " + word)) == 1


@pytest.fixture(scope="module")
def processor() -> object:
    return transformers.AutoProcessor.from_pretrained(SHAPES)


def test_the_chat_template_writes_parts_and_strings(processor) -> None:  # type: ignore[no-untyped-def]
    url = {"type": "image_url", "image_url": {"url": "x"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, url, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": "And its color?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == (
        "<s><|system|>Be brief.</s><|user|><image><image>What?</s>"
        "<|assistant|>a red circle</s><|user|>And its color?</s><|assistant|>"
    )


def test_training_sees_what_a_request_sees(processor) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(3)
    for number in (1, 2, 4):
        scenes = [world.sample_scene(rng) for _ in range(number)]
        drawn = [world.draw(each) for each in scenes]
        talk = questions.converse(scenes, 4, rng)
        text = processor.apply_chat_template(talk.messages)
        inputs = processor(text=text, images=drawn, return_tensors="pt")
        ids, targets = tokenizer.tokens(talk, network.IMAGE_TOKENS)
        assert inputs["input_ids"][0].tolist() == ids
        assert len(targets) == len(ids)
        levels = torch.from_numpy(np.stack([network.squeeze(picture) for picture in drawn]))
        assert torch.equal(inputs["pixel_values"], network.normalise(levels))


def test_targets_are_the_answers() -> None:
    talk = questions.converse([TWO], 3, random.Random(4))
    ids, targets = tokenizer.tokens(talk, 1)
    told = [target for target in targets if target >= 0]
    answers = [m["content"] for m in talk.messages if m["role"] == "assistant"]
    assert tokenizer.load().decode(told, skip_special_tokens=False) == "".join(a + "</s>" for a in answers)
    assert all(ids[i + 1] == target for i, target in enumerate(targets) if target >= 0)


def test_a_new_export_loads_in_transformers(tmp_path: Path) -> None:
    network.export(network.create().state_dict(), tmp_path)
    loaded, found = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.bfloat16
    names = set(network.read_weights(tmp_path))
    assert {"language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"} <= names
    prefixes = ("vision_tower.vision_model.", "language_model.", "multi_modal_projector.")
    assert all(name.startswith(prefixes) for name in names)
    assert (tmp_path / "model.safetensors").stat().st_size < 8_000_000


def test_committed_files_are_what_the_code_writes(tmp_path: Path) -> None:
    network.write_configs(tmp_path)
    for file in tmp_path.iterdir():
        assert (SHAPES / file.name).read_text() == file.read_text()


@pytest.fixture(scope="module")
def trained() -> evaluate.Model:
    if not (SHAPES / "model.safetensors").exists():
        pytest.skip("the weights are not here")
    torch.manual_seed(0)
    return evaluate.Model(SHAPES, torch.bfloat16)


def test_the_weights_answer_held_out_questions(trained: evaluate.Model) -> None:
    asked = [*evaluate.one_shape(100, 31), *evaluate.conversations(60, 32)]
    table = evaluate.shares(asked, evaluate.ask(trained, asked, 50, bar=False))
    right, total = table[evaluate.ONE_SHAPE]
    assert right >= 0.97 * total
    right, total = table["all kinds of question"]
    assert right >= 0.95 * total


def test_the_sample_pictures_are_answered(trained: evaluate.Model) -> None:
    asked = [
        evaluate.Question("what", pictures.ask(), [pictures.read(file)], name)
        for file, (name, _) in pictures.WANTED.items()
    ]
    assert evaluate.ask(trained, asked, 8, bar=False) == [question.answer for question in asked]
