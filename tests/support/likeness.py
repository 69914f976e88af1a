"""What is checked of every family, on its tiny model."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from engine.families.preprocessor import Preprocessor
from engine.loader import load_preprocessor
from handlers.deltas import Delta
from handlers.request import (
    ChatPrompt,
    Constraint,
    GenerationRequest,
    ImagePart,
    LoadedImage,
    Message,
    RequestSampling,
    TextPart,
)
from tests.support.engine_driver import CAPITALS, Oracle, Prompt, load_engine, run_all
from tests.support.model_front import learned
from tests.support.rolling import loaded, tokens
from tests.support.second_rank import two_ranks


@st.composite
def sizes(draw: st.DrawFn, longest: int = 400) -> tuple[int, int]:
    """(width, height): of any aspect up to 1:30, one pixel, and as many as that along the longer edge."""
    long = draw(st.integers(1, longest))
    short = max(1, round(long / draw(st.floats(1, 30))))
    return draw(st.sampled_from([(long, short), (short, long)]))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def check_arrays(preprocessor: Preprocessor[Any], image: Image.Image, variant: int = 0) -> None:
    """The direct way gives the arrays of transformers' own image processor, to the last bit."""
    want, got = preprocessor.reference(image, variant), preprocessor.direct(image, variant)
    assert want.keys() == got.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def check_front(path: Path) -> None:
    """The front prepares images like the test's own process, and imports torch for it only where torchvision is."""
    preprocessor = load_preprocessor(str(path))
    assert preprocessor is not None
    assert preprocessor.to_bytes() is not None
    found = learned(path)
    assert found["heavy"] == (["torch"] if preprocessor.metadata.recipe.with_torch else [])
    prepared = preprocessor.prepare(Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 20).convert("RGB"))
    assert found["tokens"] == len(prepared.token_ids)
    assert found["pixels"] == float(prepared.tensors["pixel_values"].sum())
    assert found["fingerprint"] == preprocessor.fingerprint.hex()


def check_two_ranks(
    path: Path,
    oracle: Oracle,
    prompts: Sequence[Prompt],
    *,
    length: int = 12,
    ignore_eos: bool = True,
    **settings: object,
) -> None:
    """Ranks that share the model give the tokens of transformers."""
    params = RequestSampling(temperature=0.0, max_tokens=length, ignore_eos=ignore_eos)
    with two_ranks(path, **settings) as engine:
        results = run_all(engine, [prompt.add(oracle.preprocessor, params) for prompt in prompts])
    for number, prompt in enumerate(prompts):
        assert results[number].token_ids == oracle.generate(prompt, length, ignore_eos=ignore_eos), f"prompt {number}"


def check_answers(path: Path, oracle: Oracle, prompts: Sequence[Prompt], **settings: object) -> None:
    """Greedy tokens of prompts that run together, with a budget that cuts them inside of images."""
    engine = load_engine(path, max_num_batched_tokens=7, max_num_seqs=4, **settings)
    params = RequestSampling(temperature=0.0, max_tokens=12, ignore_eos=True)
    results = run_all(engine, [prompt.add(oracle.preprocessor, params) for prompt in prompts])
    for number, prompt in enumerate(prompts):
        want = oracle.generate(prompt, 12, ignore_eos=True)
        assert results[number].token_ids == want, f"prompt {number}"


def check_logprobs(path: Path, oracle: Oracle, prompt: Prompt, **settings: object) -> None:
    """Those of the prompt's tokens and of the answer's equal transformers' within 1e-4."""
    params = RequestSampling(temperature=0.0, max_tokens=5, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    add = prompt.add(oracle.preprocessor, params)
    result = run_all(load_engine(path, max_num_batched_tokens=7, max_num_seqs=4, **settings), [add])[0]
    ids = torch.tensor([add.token_ids + result.token_ids])
    with torch.inference_mode():
        want = oracle.model(input_ids=ids, **oracle.inputs(prompt, ids)).logits[0].log_softmax(-1)
    rows = want[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
    prompt_logprobs = result.outputs[0].prompt_logprobs
    assert prompt_logprobs is not None
    got = [entry.logprobs[0] for entry in prompt_logprobs]
    got += [output.logprobs[0].logprobs[0] for output in result.outputs if output.logprobs is not None]
    assert got == pytest.approx(rows, abs=1e-4)
    assert all(math.isfinite(value) for value in got)


def edit_json(file: Path, **changed: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def text(string: str) -> list[int | Image.Image]:
    """Ids of the tiny tokenizer, which knows no merges."""
    return [byte % 256 for byte in string.encode()]


def expansion(preprocessor: Preprocessor[Any], images: Sequence[Image.Image]) -> list[int]:
    """Ours, of a prompt with these images and nothing else."""
    variant = preprocessor.variant(len(images))
    return [token for image in images for token in preprocessor.layout(image.width, image.height, variant).token_ids]


def check_joint_expansion(path: Path, image_token: str, images: Sequence[Image.Image], **kwargs: Any) -> None:
    """The tokens of these images in one prompt are those that the family's own joint processor writes."""
    from transformers import AutoProcessor

    try:
        joint = AutoProcessor.from_pretrained(path)
    except ImportError as error:
        pytest.skip(f"transformers has no joint processor here: {str(error).strip().splitlines()[0]}")
    preprocessor = load_preprocessor(str(path))
    assert preprocessor is not None
    want = joint(text=[f"a{image_token * len(images)}b"], images=[list(images)], **kwargs)["input_ids"][0]
    got = expansion(preprocessor, images)
    assert np.asarray(want).tolist()[1:-1] == got


def check_chat(path: Path, oracle: Oracle, template: str, images: Sequence[Image.Image]) -> None:
    """A chat through the backend: the template's prompt and transformers' answer; several answers, a stop string, and a
    grammar under which no answer holds an image token."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    said = [{"type": "image"} for _ in images] + [{"type": "text", "text": "what?"}]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": said}], chat_template=template, add_generation_prompt=True
    )["input_ids"]
    assert oracle.preprocessor is not None
    image_token_id, waiting = oracle.preprocessor.image_token_id, iter(images)
    prompt = Prompt([next(waiting) if token == image_token_id else token for token in ids])
    want = oracle.generate(prompt, 12, ignore_eos=True)

    async def scenario() -> None:
        async with loaded(path) as backend:

            async def ask(
                n: int = 1, constraint: Constraint | None = None, **sampling: Any
            ) -> tuple[list[int], list[Delta]]:
                parts = [
                    ImagePart("data:", loaded=LoadedImage(image, bytes([number])))
                    for number, image in enumerate(images)
                ]
                options = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **sampling}
                chat = ChatPrompt([Message("user", [*parts, TextPart("what?")])])
                generation = await backend.generate(
                    GenerationRequest("id", chat, RequestSampling(**options), n=n, constraint=constraint)
                )
                return generation.stats.prompt_token_ids, [delta async for delta in generation]

            prompt_ids, deltas = await ask(n=2)
            assert prompt_ids == prompt.add(oracle.preprocessor, RequestSampling()).token_ids
            assert tokens(deltas, 0) == tokens(deltas, 1) == want
            _, letters = await ask(allowed_token_ids=CAPITALS)
            written = "".join(delta.text for delta in letters)
            stop = written[2]
            _, stopped = await ask(allowed_token_ids=CAPITALS, stop=(stop,))
            assert "".join(delta.text for delta in stopped) == written[: written.index(stop)]
            assert stopped[-1].finish_reason == "stop"
            _, anything = await ask(constraint=Constraint("regex", r"(.|\n)*"), logit_bias={image_token_id: 100.0})
            assert image_token_id not in tokens(anything)

    asyncio.run(scenario())
