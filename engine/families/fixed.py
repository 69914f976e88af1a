"""The preprocessor of families in which every image becomes the same number of tokens, whatever its size."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from engine.families.base import Arrays, Facts, Layout, Preprocessor
from engine.families.pixels import DirectPixels

if TYPE_CHECKING:
    from PIL.Image import Image


class FixedFacts(Facts, kw_only=True):
    num_tokens: int


FF = TypeVar("FF", bound=FixedFacts)


class FixedPreprocessor(Preprocessor[FF]):
    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        return Layout([self.facts.image_token_id] * self.facts.num_tokens)

    def direct(self, image: Image, variant: int = 0) -> Arrays:
        assert self.facts.recipe is not None
        return {"pixel_values": DirectPixels(self.facts.recipe)(image)}
