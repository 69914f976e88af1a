"""Embeddings for a model that also wants to know how a picture's patches stand: vLLM trusts what it is told there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, Qwen2VLForConditionalGeneration

from tests.live import LiveServer, chat_body
from tests.saved_tensors import encoded
from tests.scripts import run_script
from tests.test_embeddings_live import answer, body, post
from tests.vllm_live.tiny_qwen import HIDDEN, make_qwen

SHOWN = {"logprobs": True, "max_tokens": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen(tmp_path_factory.mktemp("models") / "qwen")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[LiveServer]:
    with LiveServer(model, "enable_mm_embeds=true", 'limit_mm_per_prompt={"image": 2}', "dtype=fp32") as live:
        yield live


def noise(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 80).convert("RGB")


def features(model: Path, image: Image.Image) -> dict[str, torch.Tensor]:
    load: Any = AutoImageProcessor.from_pretrained
    prepared = load(model)(image, return_tensors="pt")
    whole = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    grid = prepared["image_grid_thw"]
    with torch.inference_mode():
        (rows,) = whole.model.get_image_features(
            prepared["pixel_values"], grid, return_dict=True
        ).pooler_output
    return {"image_embeds": rows.clone(), "image_grid_thw": grid}


def scores(reply: dict[str, Any]) -> list[tuple[str, float]]:
    return [(item["token"], item["logprob"]) for item in reply["choices"][0]["logprobs"]["content"]]


def test_rows_and_their_grid_are_answered_like_the_picture(server: LiveServer, model: Path) -> None:
    wide, high = noise(120, 60), noise(60, 180)
    sent = [features(model, image) for image in (wide, high)]
    assert len({one["image_embeds"].shape for one in sent}) == 2
    picture = post(server, chat_body(wide, high, "What?", **SHOWN)).json()
    embedded = post(server, body(*sent, text="What?", **SHOWN)).json()
    assert embedded["usage"]["prompt_tokens"] == picture["usage"]["prompt_tokens"]
    pairs = list(zip(scores(picture), scores(embedded), strict=True))
    assert all(left[0] == right[0] and abs(left[1] - right[1]) < 0.01 for left, right in pairs)
    turned = post(server, body(*sent[::-1], text="What?", **SHOWN)).json()
    assert scores(turned) != scores(embedded)


SCRIPT = """
import asyncio, os, sys
from dataclasses import replace
from pathlib import Path
from handlers.backends.vllm.engine import probes as module
from handlers.build import build_backend
from properties.configuration import resolve

options = ["rolling_batch=vllm", "enforce_eager=true", "kv_cache_memory_mb=256", "enable_mm_embeds=true"]
wanted = module.embeddings_wanted

def wrong(engine):
    right = wanted(engine)
    return replace(right, hidden_size=right.hidden_size * 2)

async def main():
    module.embeddings_wanted = wrong
    backend = build_backend(resolve(model=sys.argv[1], environ=os.environ, options=options), Path(sys.argv[1]))
    try:
        await backend.load()
    except Exception as error:
        print("FAILED", type(error).__name__, error)
    await backend.close()

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_model_whose_engine_dies_of_them_does_so_at_the_start(model: Path, tmp_path: Path) -> None:
    """Here because the front is wrong about it: twice the hidden size, which vLLM does not check for this model."""
    printed = run_script(tmp_path, SCRIPT, model)
    assert "FAILED InvalidConfiguration option.enable_mm_embeds: the engine fails" in printed


ROWS = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("grid", [[1, 6, 8], [1, 2, 24], [1, 24, 2]])
def test_every_grid_that_fits_its_rows_is_answered(server: LiveServer, grid: list[int]) -> None:
    sent = {"image_embeds": ROWS, "image_grid_thw": torch.tensor(grid)}
    told = post(server, body(sent, **SHOWN)).json()
    written = body(**SHOWN)
    value = {"image_embeds": encoded(ROWS), "image_grid_thw": grid}
    written["messages"][0]["content"].insert(0, {"type": "image_embeds", "image_embeds": value})
    assert scores(post(server, written).json()) == scores(told)


@pytest.mark.parametrize(
    ("rows", "grid", "reason"),
    [
        (ROWS, None, "wants image_grid_thw beside"),
        (ROWS, [1, 6, 10], "which is 15 tokens; image_embeds has 12 rows"),
        (ROWS[:11], [1, 6, 8], "which is 12 tokens; image_embeds has 11 rows"),
        (ROWS, [1, 3, 16], "must be multiples of 2"),
        (ROWS, [1, 2**40, 2**40], "image_embeds has 12 rows"),
        (ROWS, [2, 4, 6], "a picture has 1 frame"),
        (ROWS, [0, 6, 8], "numbers from 1"),
        (ROWS[:, 1:].contiguous(), [1, 6, 8], f"wants [tokens, {HIDDEN}]"),
        (ROWS.repeat(1, 2), [1, 6, 8], f"wants [tokens, {HIDDEN}]"),
        (ROWS.repeat(2, 1), [1, 6, 8], "image_embeds has 24 rows"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_and_the_engine_lives(
    server: LiveServer, rows: torch.Tensor, grid: list[int] | None, reason: str
) -> None:
    """Sent on, most of these would end the engine's process."""
    fits = {"image_embeds": ROWS, "image_grid_thw": torch.tensor([1, 6, 8])}
    sent = rows if grid is None else {"image_embeds": rows, "image_grid_thw": torch.tensor(grid)}
    for things in ([sent], [fits, sent]):
        reply = post(server, body(*things))
        assert reply.status_code == 400
        assert f"image {len(things) - 1}: " in reply.json()["error"]["message"]
        assert reason in reply.json()["error"]["message"]
    assert answer(server, body(fits)) == answer(server, body(fits))
    assert server.metrics()["lmi_engine_restarts_total"] == 0
