"""What families that cut images into tiles of one size have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from engine.families.pixels import Levels, Pixels, Recipe

if TYPE_CHECKING:
    import torch

TILES_AT_ONCE = 16
"""Tiles that go through a vision tower together at most: bounds the memory that its activations take."""


def cut(recipe: Recipe, levels: Levels, height: int, width: int) -> list[Pixels]:
    """An image whose edges are multiples of a tile's, as tiles [3, height, width], row by row."""
    return [
        recipe.values(levels[top : top + height, left : left + width])
        for top in range(0, levels.shape[0], height)
        for left in range(0, levels.shape[1], width)
    ]


def encode_tiles(
    tower: Callable[[torch.Tensor], torch.Tensor], images: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """tower: [n, 3, height, width] -> [n, rows, D]. One [tiles x rows, D] for each image [tiles, 3, height, width]."""
    import torch

    features = torch.cat([tower(part) for part in torch.split(torch.cat(list(images)), TILES_AT_ONCE)])
    return [rows.flatten(0, 1) for rows in torch.split(features, [len(image) for image in images])]
