"""Shared by families that cut images into tiles of the vision tower's size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine.families.base import FamilyModel
from engine.families.pixels import Levels, Pixels, Recipe

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]
"""(height, width)"""

TILES_AT_ONCE = 16
"""Greatest number of tiles in one call of a vision tower, which bounds the memory of its activations."""


def cut(recipe: Recipe, levels: Levels, height: int, width: int) -> list[Pixels]:
    """Cut an image whose edges are multiples of a tile's into tiles [3, height, width], row by row."""
    return [
        recipe.values(levels[top : top + height, left : left + width])
        for top in range(0, levels.shape[0], height)
        for left in range(0, levels.shape[1], width)
    ]


class TiledModel(FamilyModel):
    """A model whose tower sees the tiles of an image: its `pixel_values` are [tiles, 3, height, width]."""

    encode_batch = 4

    def tower(self, tiles: torch.Tensor) -> torch.Tensor:
        """Map tiles [n, 3, height, width] to [n, rows, C]."""
        rows: torch.Tensor = self.features(pixel_values=tiles)
        return rows

    def rows(self, features: torch.Tensor, image: dict[str, torch.Tensor]) -> torch.Tensor:
        """Arrange what the tower made of an image's tiles, [tiles, rows, C], as [rows, D]."""
        return features.flatten(0, 1)

    def encode(self, images: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        features = encode_tiles(self.tower, [image["pixel_values"].to(self.model.dtype) for image in images])
        return [self.rows(own, image) for own, image in zip(features, images, strict=True)]


def encode_tiles(tower: Callable[[torch.Tensor], torch.Tensor], images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Encode the tiles of several images together.

    Args:
        tower: Maps tiles [n, 3, height, width] to [n, rows, C].
        images: Tiles of each image, [tiles, 3, height, width].

    Returns:
        One [tiles, rows, C] for each image.
    """
    import torch

    features = torch.cat([tower(part) for part in torch.split(torch.cat(list(images)), TILES_AT_ONCE)])
    return list(torch.split(features, [len(image) for image in images]))


def best_resolution(height: int, width: int, resolutions: Sequence[Size]) -> Size:
    """Choose the resolution that keeps most of the image's pixels, and among equals leaves the least area over.

    Among those it is the first, as in transformers' `select_best_resolution`.
    """

    def quality(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=quality)


def fitted(height: int, width: int, target: Size) -> Size:
    """Return the image's size when it is resized to fit into the target with its aspect kept."""
    scale_height, scale_width = target[0] / height, target[1] / width
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), target[0]), target[1]
    return target[0], min(math.ceil(width * scale_height), target[1])


def without_padding(height: int, width: int, grid: Size) -> Size:
    """Return the rows and columns of a grid of features that show the image, which was fitted into it and centred.

    It rounds as transformers' `unpad_image` does; a different rounding would give another number of tokens.
    """
    rows, columns = grid
    if width / height > columns / rows:
        return rows - (rows - int(round(height * (columns / width), 7))) // 2 * 2, columns
    return rows, columns - (columns - int(round(width * (rows / height), 7))) // 2 * 2


def centred(levels: Levels, target: Size) -> Levels:
    """Centre the image on black; an odd row or column is added at the bottom or the right."""
    over = [wanted - there for wanted, there in zip(target, levels.shape, strict=False)]
    return np.pad(levels, (*((extra // 2, extra - extra // 2) for extra in over), (0, 0)))
