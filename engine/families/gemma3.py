"""Gemma 3: a SigLIP tower with pooled rows, and a decoder with bidirectional attention within an image.

A template prints the start token alone. The prompt then has two line breaks, the start token, the image's
tokens, the end token and two line breaks, which are tokenised together with the text around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import ModelLoadError
from engine.families.base import Family, FamilyModel
from engine.families.preprocessor import FixedMetadata, FixedPreprocessor, ModelFiles, PlaceholderText

if TYPE_CHECKING:
    from engine.messages import ImageInput


class Gemma3Metadata(FixedMetadata, kw_only=True):
    start_token_id: int
    end_token_id: int


class Gemma3Preprocessor(FixedPreprocessor[Gemma3Metadata]):
    metadata_type = Gemma3Metadata

    @classmethod
    def read(cls, model: ModelFiles) -> Gemma3Metadata:
        if getattr(model.processor, "do_pan_and_scan", None):
            raise ModelLoadError(
                "do_pan_and_scan, which adds crops of an image to the prompt, is not supported by the embedded engine; "
                "set it to false in preprocessor_config.json or option.mm_processor_kwargs"
            )
        config = model.config
        return Gemma3Metadata(
            image_token_id=model.image_token_id,
            recipe=model.whole_recipe,
            num_tokens=int(config.mm_tokens_per_image),
            start_token_id=int(config.boi_token_index),
            end_token_id=int(config.eoi_token_index),
        )

    def written(self, tokenizer: Any) -> PlaceholderText:
        start, image, end = tokenizer.convert_ids_to_tokens(
            [self.metadata.start_token_id, self.metadata.image_token_id, self.metadata.end_token_id]
        )
        return PlaceholderText(f"\n\n{start}{image}{end}\n\n", printed=start)


class Gemma3Model(FamilyModel):
    special_attention = True
    encode_batch = 4

    def spans(self, token_ids: Sequence[int], images: Sequence[ImageInput]) -> list[tuple[int, int]]:
        runs: list[tuple[int, int]] = []
        for image in images:
            start = image.offset
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, image.end))
        return runs


FAMILY = Family(Gemma3Model, Gemma3Preprocessor)
