"""InternVL in transformers' own format: a vision tower that sees tiles, a projector, and a text decoder.

An image is resized to the grid of tiles whose aspect is nearest to its own and cut; a thumbnail of it follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import ModelLoadError
from engine.families.base import Family
from engine.families.pixels import ProcessorBackend, size_of
from engine.families.preprocessor import Arrays, Layout, Metadata, ModelFiles, Preprocessor
from engine.families.tiles import TiledModel, cut

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PretrainedConfig


class InternVLMetadata(Metadata, kw_only=True):
    """Metadata of an InternVL model.

    Attributes:
        tile: (width, height) of a tile.
        fewest: Smallest number of tiles of an image, without its thumbnail; 1 where images are not cut.
        most: Greatest number of tiles of an image, without its thumbnail; 1 where images are not cut.
        rows: Rows of the encoder for each tile.
        start: Token before an image's tokens.
        end: Token after an image's tokens.
    """

    tile: tuple[int, int]
    fewest: int
    most: int
    rows: int
    start: int
    end: int


class InternVLPreprocessor(Preprocessor[InternVLMetadata]):
    metadata_type = InternVLMetadata
    takes_embeddings = False
    probes = ((40, 64), (129, 77), (1000, 30), (30, 900))

    @classmethod
    def from_model(
        cls, model_path: str, overrides: dict[str, Any] | None = None, backend: ProcessorBackend = "auto"
    ) -> Preprocessor[InternVLMetadata]:
        """Cut images unless an override says otherwise.

        transformers' joint processor does so, even where the image processor's file says otherwise.
        """
        return super().from_model(model_path, {"crop_to_patches": True, **(overrides or {})}, backend)

    @classmethod
    def read(cls, model: ModelFiles) -> InternVLMetadata:
        processor, tokenizer = model.processor, model.tokenizer
        cuts = bool(processor.crop_to_patches)
        return InternVLMetadata(
            image_token_id=model.image_token_id,
            recipe=model.recipe,
            tile=_tile(processor, model.config),
            fewest=int(processor.min_patches) if cuts else 1,
            most=int(processor.max_patches) if cuts else 1,
            rows=rows_per_tile(model.config),
            start=_token_id(tokenizer, "start_image_token", "<img>"),
            end=_token_id(tokenizer, "end_image_token", "</img>"),
        )

    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        metadata = self.metadata
        columns, rows = self._grid(width, height)
        tiles = columns * rows + (columns * rows > 1)
        count = tiles * metadata.rows
        token_ids = [metadata.start, *[metadata.image_token_id] * count, metadata.end]
        return Layout.marked(token_ids, metadata.image_token_id)

    def direct(self, image: Image, variant: int = 0) -> Arrays:
        metadata = self.metadata
        recipe = self.recipe
        width, height = metadata.tile
        columns, rows = self._grid(*image.size)
        tiles = cut(recipe, recipe.resized(image, (columns * width, rows * height)), height, width)
        if len(tiles) > 1:
            tiles.append(recipe.values(recipe.resized(image, metadata.tile)))
        return {"pixel_values": np.stack(tiles)}

    def reference(self, image: Image, variant: int = 0) -> Arrays:
        return {"pixel_values": np.asarray(self._processor(images=image, return_tensors="np")["pixel_values"])}

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of the nearest aspect.

        It is the smallest such grid, or the largest that the image fills to half.
        """
        metadata = self.metadata
        edges = range(1, metadata.most + 1)
        grids = [(c, r) for c in edges for r in edges if metadata.fewest <= c * r <= metadata.most]
        best, nearest = (1, 1), float("inf")
        for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            distance = abs(width / height - columns / rows)
            fills_half = width * height > 0.5 * metadata.tile[0] * metadata.tile[1] * columns * rows
            if distance < nearest or (distance == nearest and fills_half):
                best, nearest = (columns, rows), distance
        return best


class InternVLModel(TiledModel):
    @classmethod
    def check(cls, config: PretrainedConfig) -> None:
        super().check(config)
        if (strategy := config.vision_feature_select_strategy) != "default":
            raise ModelLoadError(f"its vision_feature_select_strategy is {strategy!r}; supported: 'default'")


def rows_per_tile(config: PretrainedConfig) -> int:
    """Count the rows that the projector gives for one tile of the tower's size."""
    vision = config.vision_config
    down, across = (
        int(image // patch * config.downsample_ratio)
        for image, patch in zip(vision.image_size, vision.patch_size, strict=True)
    )
    return down * across


def _tile(processor: Any, config: PretrainedConfig) -> tuple[int, int]:
    """Return (width, height) of a tile.

    Raises:
        ModelLoadError: The processor's tiles do not have the size that the tower takes.
    """
    if not processor.do_resize:
        raise ModelLoadError("its image processor has do_resize off; images of any size are not supported")
    size = size_of(processor)
    height, width = config.vision_config.image_size
    if size != {"height": height, "width": width}:
        raise ModelLoadError(
            f"its image processor makes tiles of {size}, but its vision tower takes {width} x {height} pixels"
        )
    return width, height


def _token_id(tokenizer: Any, name: str, text: str) -> int:
    """Look up a token by the tokenizer's own name for it, or by its text in InternVL's tokenizers."""
    token_id = tokenizer.convert_tokens_to_ids(getattr(tokenizer, name, None) or text)
    if token_id is None or token_id == tokenizer.unk_token_id:
        raise ModelLoadError(f"its tokenizer has no {name} ({text})")
    return int(token_id)


FAMILY = Family(InternVLModel, InternVLPreprocessor)
