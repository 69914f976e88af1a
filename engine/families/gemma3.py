"""Gemma 3: a SigLIP tower whose rows are pooled, and a decoder in which an image's tokens see each other both ways.

A template prints the start token alone; the prompt then has two line breaks, the start token, the image's tokens, the
end token and two line breaks, which are tokenised together with the text around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import ModelLoadError
from engine.families.base import (
    Family,
    FamilyModel,
    ModelFiles,
    Written,
)
from engine.families.fixed import FixedFacts, FixedPreprocessor
from engine.families.pixels import recipe_of
from engine.families.text import check_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from engine.messages import Picture


class Gemma3Facts(FixedFacts, kw_only=True):
    start_token_id: int
    end_token_id: int


class Gemma3Preprocessor(FixedPreprocessor[Gemma3Facts]):
    facts_type = Gemma3Facts

    @classmethod
    def read(cls, model: ModelFiles) -> Gemma3Facts:
        if getattr(model.processor, "do_pan_and_scan", None):
            raise ModelLoadError(
                "do_pan_and_scan, which adds crops of an image to the prompt, is not supported by the embedded engine; "
                "set it to false in preprocessor_config.json or option.mm_processor_kwargs"
            )
        config = model.config
        return Gemma3Facts(
            image_token_id=int(config.image_token_id),
            recipe=recipe_of(model.processor, model.backend),
            num_tokens=int(config.mm_tokens_per_image),
            start_token_id=int(config.boi_token_index),
            end_token_id=int(config.eoi_token_index),
        )

    def written(self, tokenizer: Any) -> Written:
        start, image, end = tokenizer.convert_ids_to_tokens(
            [self.facts.start_token_id, self.facts.image_token_id, self.facts.end_token_id]
        )
        return Written(f"\n\n{start}{image}{end}\n\n", printed=start)


class Gemma3Model(FamilyModel):
    special_attention = True
    encode_batch = 4

    @classmethod
    def check(cls, config: PretrainedConfig) -> None:
        check_text(config.text_config)

    def spans(self, token_ids: Sequence[int], pictures: Sequence[Picture]) -> list[tuple[int, int]]:
        runs: list[tuple[int, int]] = []
        for picture in pictures:
            start = picture.offset
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, picture.end))
        return runs


FAMILY = Family(Gemma3Model, Gemma3Preprocessor)
