"""Idefics3 and SmolVLM: a SigLIP tower that sees tiles, a connector that merges patches, and a Llama decoder.

An image is resized to multiples of a tile and cut; the whole image, shrunk to one tile, follows. In the
prompt a tag before each tile names its position.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import ModelLoadError
from engine.families.base import Family
from engine.families.pixels import size_of
from engine.families.preprocessor import Arrays, Layout, Metadata, ModelFiles, Preprocessor
from engine.families.tiles import TiledModel, cut

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig

LONGEST_EDGE = 4096
"""No image is enlarged beyond this, even if the processor's size is larger."""

AROUND, GLOBAL, TAG = "<fake_token_around_image>", "<global-img>", "<row_{}_col_{}>"


class Idefics3Metadata(Metadata, kw_only=True):
    """Metadata of an Idefics3 model.

    Attributes:
        tile: Edge of a tile in pixels.
        longest: Longest edge of an image before it is cut; None where images keep their size.
        splits: Whether images are cut.
        rows: Rows of the encoder for each tile.
        before: Tokens before the image tokens of the tile at [row][column].
        before_global: Tokens before the image tokens of the whole image.
        line: Tokens after each row of tiles but the last.
        last_line: Tokens after the last row of tiles.
        after: Tokens after the image.
    """

    tile: int
    longest: int | None
    splits: bool
    rows: int
    before: list[list[list[int]]]
    before_global: list[int]
    line: list[int]
    last_line: list[int]
    after: list[int]


class Idefics3Preprocessor(Preprocessor[Idefics3Metadata]):
    metadata_type = Idefics3Metadata
    takes_embeddings = False
    probes = ((40, 64), (129, 77), (1000, 30), (30, 900))

    @classmethod
    def read(cls, model: ModelFiles) -> Idefics3Metadata:
        processor = model.processor
        tile = int(processor.max_image_size["longest_edge"])
        longest = _longest_edge(processor)
        most = -(-(LONGEST_EDGE if longest is None else longest + 1) // tile)

        def ids(text: str) -> list[int]:
            encoded = model.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
            return [int(token) for token in encoded.ids]

        return Idefics3Metadata(
            image_token_id=model.image_token_id,
            recipe=model.recipe,
            tile=tile,
            longest=longest,
            splits=bool(processor.do_image_splitting),
            rows=rows_per_tile(model.config, tile),
            before=[[ids(AROUND + TAG.format(row + 1, column + 1)) for column in range(most)] for row in range(most)],
            before_global=ids(AROUND + GLOBAL),
            line=ids("\n"),
            last_line=ids("\n\n"),
            after=ids(AROUND),
        )

    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        metadata = self.metadata
        token_ids: list[int] = []
        is_embed: list[bool] = []

        def add(before: list[int], image: bool = True) -> None:
            rows = metadata.rows if image else 0
            token_ids.extend([*before, *[metadata.image_token_id] * rows])
            is_embed.extend([False] * len(before) + [True] * rows)

        rows, columns = self._grid(width, height)
        for row in range(rows):
            for column in range(columns):
                add(metadata.before[row][column])
            add(metadata.line if row + 1 < rows else metadata.last_line, image=False)
        add(metadata.before_global)
        add(metadata.after, image=False)
        return Layout(token_ids, is_embed)

    def direct(self, image: Image, variant: int = 0) -> Arrays:
        from PIL.Image import fromarray

        metadata = self.metadata
        recipe = self.recipe
        rows, columns = self._grid(*image.size)
        size = self._resized(*image.size)
        if size != image.size:
            image = fromarray(recipe.resized(image, size))
        tiles = []
        if rows:
            levels = recipe.resized(image, (columns * metadata.tile, rows * metadata.tile))
            tiles = cut(recipe, levels, metadata.tile, metadata.tile)
            image = fromarray(levels)
        tiles.append(recipe.values(recipe.resized(image, (metadata.tile, metadata.tile))))
        return {"pixel_values": np.stack(tiles)}

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of tiles; (0, 0) where the image is not cut."""
        if not self.metadata.splits:
            return 0, 0
        width, height = self._resized(width, height)
        tile, aspect = self.metadata.tile, width / height
        if width >= height:
            columns = math.ceil(width / tile)
            rows = math.ceil(int(columns * tile / aspect) / tile)
        else:
            rows = math.ceil(height / tile)
            columns = math.ceil(int(rows * tile * aspect) / tile)
        return (rows, columns) if rows > 1 or columns > 1 else (0, 0)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) with the longest edge as the processor requires it, and the other one even."""
        longest = self.metadata.longest
        if longest is None:
            return width, height
        aspect = width / height
        if width >= height:
            width, height = longest, int(longest / aspect)
            height += height % 2
        else:
            width, height = int(longest * aspect), longest
            width += width % 2
        width, height = max(width, 1), max(height, 1)
        aspect = width / height
        if width >= height and width > LONGEST_EDGE:
            width, height = LONGEST_EDGE, int(LONGEST_EDGE / aspect)
        elif height > width and height > LONGEST_EDGE:
            width, height = int(LONGEST_EDGE * aspect), LONGEST_EDGE
        return max(width, 1), max(height, 1)


class Idefics3Model(TiledModel):
    def tower(self, tiles: torch.Tensor) -> torch.Tensor:
        """Encode all tiles.

        transformers' own method takes tiles of zeros for padding and drops them; without normalisation a black tile is
        such a tile.
        """
        inner = self.model.model
        rows: torch.Tensor = inner.connector(inner.vision_model(pixel_values=tiles).last_hidden_state)
        return rows


def rows_per_tile(config: PretrainedConfig, tile: int) -> int:
    """Count the rows of the encoder for a tile.

    Raises:
        ModelLoadError: The connector cannot merge a tile's patches.
    """
    patches, merged = tile // config.vision_config.patch_size, config.scale_factor
    if patches % merged:
        raise ModelLoadError(
            f"its tiles of {tile} pixels have {patches} patches on a side, which cannot be merged {merged} by {merged}"
        )
    return int((patches // merged) ** 2)


def _longest_edge(processor: Any) -> int | None:
    if not processor.do_resize:
        return None
    size = size_of(processor)
    if set(size) != {"longest_edge"}:
        raise ModelLoadError(f"its image processor has the size {size}; supported: longest_edge alone")
    return size["longest_edge"]


FAMILY = Family(Idefics3Model, Idefics3Preprocessor)
