"""The geometry of images that are cut into tiles of the vision tower's size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from engine.families.pixels import Levels

Size = tuple[int, int]
"""(height, width)"""


def best_resolution(height: int, width: int, resolutions: Sequence[Size]) -> Size:
    """The one that keeps most of the image's pixels, and among equals the one with the least area left over: the
    first of those, as transformers' `select_best_resolution`."""

    def quality(resolution: Size) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - resolution[0] * resolution[1]

    return max(resolutions, key=quality)


def fitted(height: int, width: int, target: Size) -> Size:
    """The image's size when it is resized to fit into the target with its aspect kept."""
    scale_height, scale_width = target[0] / height, target[1] / width
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), target[0]), target[1]
    return target[0], min(math.ceil(width * scale_height), target[1])


def without_padding(height: int, width: int, grid: Size) -> Size:
    """Rows and columns of a grid of features that show the image, which was fitted into it and centred.

    The roundings are those of transformers' `unpad_image`: where they differ, the number of tokens does.
    """
    rows, columns = grid
    if width / height > columns / rows:
        return rows - (rows - int(round(height * (columns / width), 7))) // 2 * 2, columns
    return rows, columns - (columns - int(round(width * (rows / height), 7))) // 2 * 2


def centred(levels: Levels, target: Size) -> Levels:
    """The image in the middle of black; an odd row or column is added at the bottom or the right."""
    over = [wanted - there for wanted, there in zip(target, levels.shape, strict=False)]
    return np.pad(levels, (*((extra // 2, extra - extra // 2) for extra in over), (0, 0)))
