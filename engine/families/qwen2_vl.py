"""Qwen2-VL and Qwen2.5-VL: images of any size, positions on three axes.

An image is resized, aspect kept, to whole squares of patches, and each square of `merge` x `merge` patches becomes one
token. A text token has the same position on all axes (frame, row, column); those of an image differ by row and column.
Positions continue after the longer of the image's sides, so most positions are smaller than the index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.errors import ModelLoadError, RequestRejected
from engine.families.base import Family, FamilyModel
from engine.families.pixels import ProcessorBackend
from engine.families.preprocessor import GRID, Arrays, Layout, Metadata, ModelFiles, PlaceholderText, Preprocessor

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerFast

    from engine.messages import ImageInput

MOST_ASPECT = 200
"""Greatest ratio of the longer to the shorter side, as in the family's image processor."""

_LIMITS = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}


class Qwen2VLMetadata(Metadata, kw_only=True):
    """Metadata of a Qwen2-VL model.

    Attributes:
        patch: Pixels along the side of a patch.
        merge: Patches along the side of a token.
        frames: Frames of a patch, which are identical for an image.
        min_pixels: Smallest number of pixels of an image after resizing.
        max_pixels: Greatest number of pixels of an image after resizing.
        around: Tokens before and after an image.
    """

    patch: int
    merge: int
    frames: int
    min_pixels: int
    max_pixels: int
    around: tuple[int, int]


class Qwen2VLPreprocessor(Preprocessor[Qwen2VLMetadata]):
    """`pixel_values` are [patches, channels x pixels]: one frame of each patch, since the others are identical."""

    metadata_type = Qwen2VLMetadata
    probes = ((40, 64), (129, 77), (1500, 50), (1, 30), (301, 300))

    @classmethod
    def read(cls, model: ModelFiles) -> Qwen2VLMetadata:
        config, processor = model.config, model.processor
        least, most = (int(processor.size[edge] or 0) for edge in ("shortest_edge", "longest_edge"))
        if not 0 < least <= most:
            raise ModelLoadError(
                f"the image processor's min_pixels is {least} and its max_pixels {most}; both must be positive and the "
                "first not the larger (mm_processor_kwargs, or size in preprocessor_config.json)"
            )
        if not processor.do_resize:
            raise ModelLoadError("the image processor of this family must resize: remove do_resize=false")
        return Qwen2VLMetadata(
            image_token_id=model.image_token_id,
            recipe=model.recipe,
            patch=int(processor.patch_size),
            merge=int(processor.merge_size),
            frames=int(processor.temporal_patch_size),
            min_pixels=least,
            max_pixels=most,
            around=(int(config.vision_start_token_id), int(config.vision_end_token_id)),
        )

    @classmethod
    def from_model(
        cls, model_path: str, overrides: dict[str, Any] | None = None, backend: ProcessorBackend = "auto"
    ) -> Preprocessor[Qwen2VLMetadata]:
        """Overrides may write the limits as `size`, too, which transformers drops where the file has the old names."""
        wanted = dict(overrides or {})
        for edge, value in (wanted.pop("size", None) or {}).items():
            if edge not in _LIMITS:
                raise ModelLoadError(
                    f"mm_processor_kwargs: size has {edge!r}; this model's are {' and '.join(_LIMITS)}, in pixels"
                )
            wanted.setdefault(_LIMITS[edge], value)
        return super().from_model(model_path, wanted, backend)

    @property
    def grid_merge(self) -> int:
        return self.metadata.merge

    def written(self, tokenizer: PreTrainedTokenizerFast) -> PlaceholderText:
        ids = (self.metadata.around[0], self.image_token_id, self.metadata.around[1])
        return PlaceholderText("".join(str(tokenizer.convert_ids_to_tokens(token)) for token in ids))

    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        size = self.target(width, height)
        squares = size[0] * size[1] // (self.metadata.patch * self.metadata.merge) ** 2
        return Layout([self.image_token_id] * squares)

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) after resizing.

        Both are multiples of a token's side, as close to the image's own size and aspect as the limits on pixels allow.

        Raises:
            RequestRejected: The image is too long.
        """
        if max(width, height) > MOST_ASPECT * min(width, height):
            raise RequestRejected(
                f"it is {width}x{height} pixels; this model takes images whose longer side is at most {MOST_ASPECT} "
                "times the shorter"
            )
        unit = self.metadata.patch * self.metadata.merge
        columns, rows = round(width / unit), round(height / unit)
        if columns * rows * unit**2 > self.metadata.max_pixels:
            shrink = math.sqrt(width * height / self.metadata.max_pixels)
            columns, rows = (max(1, math.floor(side / shrink / unit)) for side in (width, height))
        elif columns * rows * unit**2 < self.metadata.min_pixels:
            grow = math.sqrt(self.metadata.min_pixels / (width * height))
            columns, rows = (math.ceil(side * grow / unit) for side in (width, height))
        return columns * unit, rows * unit

    def direct(self, image: Image, variant: int = 0) -> Arrays:
        recipe = self.recipe
        pixels = recipe.values(recipe.resized(image, self.target(*image.size)))
        patch, merge = self.metadata.patch, self.metadata.merge
        rows, columns = (side // patch for side in pixels.shape[1:])
        # [channel, row of squares, row in it, y, column of squares, column in it, x]
        split = pixels.reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
        patches = split.transpose(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, 3 * patch**2)
        return {"pixel_values": patches, GRID: np.array([1, rows, columns], dtype=np.int64)}

    def reference(self, image: Image, variant: int = 0) -> Arrays:
        out = self._processor(images=image, return_tensors="np")
        patches = np.asarray(out["pixel_values"])
        frames = patches.reshape(len(patches), 3, self.metadata.frames, self.metadata.patch**2)
        return {"pixel_values": frames[:, :, 0].reshape(len(patches), -1), GRID: np.asarray(out[GRID][0])}

    def positions(self, num_tokens: int, images: Sequence[ImageInput]) -> tuple[npt.NDArray[np.int64] | None, int]:
        if not images:
            return None, 0
        positions = np.empty((3, num_tokens), dtype=np.int64)
        at = behind = 0
        for image in images:
            positions[:, at : image.offset] = np.arange(behind, behind + image.offset - at)
            behind += image.offset - at
            _, rows, columns = (int(side) // self.metadata.merge for side in image.tensors[GRID].unpack())
            own = positions[:, image.offset : image.end]
            own[0] = behind
            own[1] = behind + np.repeat(np.arange(rows), columns)
            own[2] = behind + np.tile(np.arange(columns), rows)
            behind += max(rows, columns)
            at = image.end
        positions[:, at:] = np.arange(behind, behind + num_tokens - at)
        return positions, behind - at


class Qwen2VLModel(FamilyModel):
    decoder_types = None
    position_axes = 3

    encode_patches = 1 << 14
    """Greatest number of patches encoded in one call, unless a single image has more: one image can have 65,536."""

    def encode(self, images: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        import torch

        frames = self.model.config.vision_config.temporal_patch_size
        rows: list[torch.Tensor] = []
        for some in _bounded(images, self.encode_patches):
            patches = torch.cat([image["pixel_values"] for image in some])
            features = self.model.model.get_image_features(
                pixel_values=patches.reshape(len(patches), 3, 1, -1).expand(-1, -1, frames, -1).flatten(1),
                image_grid_thw=torch.stack([image[GRID] for image in some]),
                return_dict=True,
            )
            rows += self.rows(features)
        return rows

    def rows(self, features: Any) -> Sequence[torch.Tensor]:
        """Make one [rows, row_size] per image from the output of the vision tower."""
        rows: Sequence[torch.Tensor] = features.pooler_output
        return rows


def _bounded(images: Sequence[dict[str, torch.Tensor]], most: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Group images so that a group has at most `most` patches, or one image."""
    group: list[dict[str, torch.Tensor]] = []
    patches = 0
    for image in images:
        own = len(image["pixel_values"])
        if group and patches + own > most:
            yield group
            group, patches = [], 0
        group.append(image)
        patches += own
    yield group


FAMILY = Family(Qwen2VLModel, Qwen2VLPreprocessor)
