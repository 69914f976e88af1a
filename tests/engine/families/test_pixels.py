"""The direct way from image to pixels gives the processors' own numbers, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor

from engine.errors import ModelLoadError
from engine.families.llava import LlavaPreprocessor
from engine.families.pixels import recipe_of
from tests.support.models import make_llava

PROCESSORS: dict[str, Any] = {
    "clip": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "clip, crop larger than the image": CLIPImageProcessor(
        size={"shortest_edge": 20}, crop_size={"height": 32, "width": 33}
    ),
    "clip without crop": CLIPImageProcessor(size={"height": 24, "width": 30}, do_center_crop=False),
    "siglip": SiglipImageProcessor(size={"height": 28, "width": 28}),
    "clip without normalising": CLIPImageProcessor(
        size={"height": 16, "width": 16}, do_center_crop=False, do_normalize=False
    ),
}


@pytest.mark.parametrize("name", sorted(PROCESSORS))
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 120), st.integers(1, 120), st.integers(0, 2**32 - 1))
def test_pixels_equal_the_processors(name: str, width: int, height: int, seed: int) -> None:
    processor = PROCESSORS[name]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    recipe = recipe_of(processor, processor.backend)
    assert recipe is not None
    want = np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0])
    np.testing.assert_array_equal(recipe.pixels(image), want)


@pytest.mark.parametrize("name", ["clip", "clip without crop", "siglip", "clip without normalising"])
@settings(max_examples=25, deadline=None)
@given(st.integers(40, 400), st.integers(40, 400), st.integers(0, 2**32 - 1))
def test_torchvisions_arithmetic_is_close_to_pillows_on_smooth_images(
    name: str, width: int, height: int, seed: int
) -> None:
    """To the last bit it is compared by the test above, wherever torchvision is installed."""
    processor = PROCESSORS[name]
    coarse = np.random.default_rng(seed).integers(30, 220, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
    # Where torchvision is installed, the plain name is its own processor.
    pillows = getattr(transformers, f"{type(processor).__name__.removesuffix('Pil')}Pil")(**processor.to_dict())
    recipes = [recipe_of(processor, "torchvision"), recipe_of(pillows, "pil")]
    got, want = (recipe.pixels(image) for recipe in recipes if recipe is not None)
    std = np.array(processor.image_std if processor.do_normalize else [1.0] * 3, np.float32)
    levels = np.abs(got - want) * std[:, None, None] * 255
    assert levels.max() < 3.001
    assert (levels > 0.5).mean() < 0.15


def test_a_step_that_only_torchvision_itself_knows_needs_it(tmp_path: Path) -> None:
    processor = CLIPImageProcessor(size={"height": 28, "width": 28}, resample=Image.Resampling.HAMMING)
    if processor.backend == "torchvision":
        pytest.skip("torchvision is installed: its processor would be used")
    processor.save_pretrained(make_llava(tmp_path))
    with pytest.raises(ModelLoadError, match="install torchvision"):
        LlavaPreprocessor.from_model(str(tmp_path), backend="torchvision")


def test_a_processor_with_another_step_is_used_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(PROCESSORS["siglip"])
    own = kind.normalize

    def odd(self: Any, image: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, image, *args, **kwargs) + np.asarray(image).mean()

    monkeypatch.setattr(kind, "normalize", odd)
    preprocessor = LlavaPreprocessor.from_model(str(make_llava(tmp_path, tower="siglip")))
    assert preprocessor.to_bytes() is None
    image = Image.new("RGB", (30, 40), (10, 200, 30))
    processor = kind.from_pretrained(tmp_path)
    want = np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0])
    np.testing.assert_array_equal(preprocessor.prepare(image).tensors["pixel_values"], want)
