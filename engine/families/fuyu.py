"""Fuyu: no vision tower; a linear layer maps each patch of an image to a row of the prompt.

The image comes first, with a line-break token after each row of patches; then the beginning-of-sequence
token, the text and the token after which the completion begins. Image and text are tokenised separately. A
prompt may contain one image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import ModelLoadError
from engine.families.base import Family, FamilyModel
from engine.families.preprocessor import Arrays, Layout, Metadata, ModelFiles, Preprocessor

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig

    from engine.tensor_parallel import Ranks

_LINE_BREAK, _BOS, _ANSWER = "|NEWLINE|", "<s>", "<0x04>"
"""The published tokenizer names another token as its beginning of the sequence; the processor writes "<s>"."""

_TEMPLATE = (
    "{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}"
    "{{ raise_exception('Fuyu answers a single user message: send no other messages') }}"
    "{%- endif -%}"
    "{%- for part in messages[0]['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}"
)

_TP_PLAN = {
    "layers.*.self_attn.query_key_value": "colwise",
    "layers.*.self_attn.dense": "rowwise",
    "layers.*.mlp.dense_h_to_4h": "colwise",
    "layers.*.mlp.dense_4h_to_h": "rowwise",
}


class FuyuMetadata(Metadata, kw_only=True):
    """Metadata of a Fuyu model.

    Attributes:
        most: Greatest (height, width) of an image.
        patch: (height, width) of a patch.
        padding: 8-bit level of the padding around an image.
        line_break_id: Token after each row of patches.
        bos_token_id: Beginning-of-sequence token.
        answer_token_id: Token after which the completion begins.
    """

    most: tuple[int, int]
    patch: tuple[int, int]
    padding: int
    line_break_id: int
    bos_token_id: int
    answer_token_id: int


class FuyuPreprocessor(Preprocessor[FuyuMetadata]):
    metadata_type = FuyuMetadata
    tensor_names = ("image_patches",)
    chat_template = _TEMPLATE
    takes_embeddings = False
    max_images = 1
    probes = ((40, 64), (129, 77), (2000, 50), (50, 1200))

    @classmethod
    def read(cls, model: ModelFiles) -> FuyuMetadata:
        processor = model.processor
        most, patch = ((int(size["height"]), int(size["width"])) for size in (processor.size, processor.patch_size))
        if not processor.do_pad or processor.padding_mode != "constant" or not processor.do_resize:
            raise ModelLoadError(
                "preprocessor_config.json of a Fuyu has to resize, and to pad with a constant, as published"
            )
        break_id, bos_id, answer_id = model.tokenizer.convert_tokens_to_ids([_LINE_BREAK, _BOS, _ANSWER])
        if None in (break_id, bos_id, answer_id):
            raise ModelLoadError(f"the tokenizer of a Fuyu has {_LINE_BREAK}, {_BOS} and {_ANSWER}; this one has not")
        return FuyuMetadata(
            image_token_id=model.image_token_id,
            recipe=model.recipe,
            most=most,
            patch=patch,
            padding=int(processor.padding_value),
            line_break_id=break_id,
            bos_token_id=bos_id,
            answer_token_id=answer_id,
        )

    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        metadata = self.metadata
        rows, columns = self._grid(*self._resized(width, height))
        token_ids = ([metadata.image_token_id] * columns + [metadata.line_break_id]) * rows
        return Layout.marked(token_ids, metadata.image_token_id)

    def around(self, num_images: int) -> tuple[list[int], list[int]]:
        if not num_images:
            return [], []
        return [self.metadata.image_token_id, self.metadata.bos_token_id], [self.metadata.answer_token_id]

    def direct(self, image: Image, variant: int = 0) -> Arrays:
        recipe = self.recipe
        width, height = self._resized(*image.size)
        rows, columns = self._grid(width, height)
        tall, wide = rows * self.metadata.patch[0], columns * self.metadata.patch[1]
        levels = np.full((tall, wide, 3), self.metadata.padding, dtype=np.uint8)
        resized = np.asarray(image) if image.size == (width, height) else recipe.resized(image, (width, height))
        levels[:height, :width] = resized[:tall, :wide]
        return {"image_patches": self._patches(recipe.values(levels))}

    def reference(self, image: Image, variant: int = 0) -> Arrays:
        (pixels,) = self._processor(images=[[image]], return_tensors="np")["images"][0]
        rows, columns = self._grid(*self._resized(*image.size))
        inside = np.asarray(pixels)[:, : rows * self.metadata.patch[0], : columns * self.metadata.patch[1]]
        return {"image_patches": self._patches(inside)}

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        most_height, most_width = self.metadata.most
        if width <= most_width and height <= most_height:
            return width, height
        scale = min(most_height / height, most_width / width)
        # At least one pixel wide, since transformers fails on narrower images.
        return max(1, int(width * scale)), max(1, int(height * scale))

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of patches that hold a pixel."""
        rows, columns = (
            min(math.ceil(edge / patch), most // patch)
            for edge, patch, most in zip((height, width), self.metadata.patch, self.metadata.most, strict=True)
        )
        return rows, columns

    def _patches(self, pixels: np.ndarray) -> np.ndarray:
        """[3, height, width] -> [patches, patch height * patch width * 3]."""
        tall, wide = self.metadata.patch
        channels, height, width = pixels.shape
        cut = pixels.reshape(channels, height // tall, tall, width // wide, wide)
        return np.ascontiguousarray(cut.transpose(1, 3, 2, 4, 0).reshape(-1, tall * wide * channels))


class FuyuModel(FamilyModel):
    tensor_parallel_plan = _TP_PLAN

    @classmethod
    def check(cls, config: PretrainedConfig) -> None:
        if config.text_config.model_type != "persimmon":
            raise ModelLoadError(f"a Fuyu's decoder is a persimmon, not {config.text_config.model_type!r}")

    def shard(self, ranks: Ranks) -> None:
        super().shard(ranks)
        for layer in self.decoder.layers:  # type: ignore[union-attr]
            layer.self_attn.num_heads //= ranks.size

    def encode(self, images: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        embed = self.model.model.vision_embed_tokens
        return [embed(image["image_patches"].to(self.model.dtype)) for image in images]


FAMILY = Family(FuyuModel, FuyuPreprocessor)
