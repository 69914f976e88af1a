"""Llava-Next (Llava 1.6): a Llava that sees an image twice, whole and as a grid of tiles of the tower's size.

The grid is the one of `image_grid_pinpoints` that suits the image's size best. Features that show padding are
dropped, and a learned row ends each line of the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from engine.errors import ModelLoadError
from engine.families.base import Family
from engine.families.llava import LlavaModel, num_image_tokens
from engine.families.preprocessor import Arrays, Layout, Metadata, ModelFiles, Preprocessor
from engine.families.tiles import Size, TiledModel, best_resolution, centred, cut, fitted, without_padding

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig


class LlavaNextMetadata(Metadata, kw_only=True):
    """Metadata of a Llava-Next model.

    Attributes:
        tile: Edge of a tile in pixels.
        patches: Edge of a tile in features.
        resolutions: (height, width) of the grids.
    """

    tile: int
    patches: int
    resolutions: list[Size]


class LlavaNextPreprocessor(Preprocessor[LlavaNextMetadata]):
    metadata_type: ClassVar[type[Metadata]] = LlavaNextMetadata
    tensor_names = ("pixel_values", "image_sizes")
    probes = ((40, 64), (700, 300), (129, 1111), (601, 600))

    @classmethod
    def read(cls, model: ModelFiles) -> LlavaNextMetadata:
        vision = model.config.vision_config
        resolutions = _resolutions(model.config)
        if [tuple(size) for size in model.processor.image_grid_pinpoints] != resolutions:
            raise ModelLoadError(
                "the image processor's image_grid_pinpoints are not those of config.json, so images would become "
                "other numbers of tokens than the model has features for: make them equal"
            )
        edges = {
            int(edge)
            for size in (model.processor.size, model.processor.crop_size)
            for edge in dict(size or {}).values()
            if edge
        }
        if edges != {vision.image_size}:
            raise ModelLoadError(
                f"the image processor makes tiles of {', '.join(map(str, sorted(edges)))} pixels, but the vision "
                f"tower takes {vision.image_size}: make them equal"
            )
        return LlavaNextMetadata(
            image_token_id=model.image_token_id,
            recipe=model.recipe,
            tile=int(vision.image_size),
            patches=int(vision.image_size // vision.patch_size),
            resolutions=resolutions,
        )

    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        rows, columns = self.grid(width, height)
        whole = self.metadata.patches**2
        return Layout([self.metadata.image_token_id] * (whole + rows * (columns + 1)))

    def grid(self, width: int, height: int) -> Size:
        """Return the rows and columns of features of the tiles."""
        resolution = best_resolution(height, width, self.metadata.resolutions)
        rows, columns = (edge // self.metadata.tile * self.metadata.patches for edge in resolution)
        return without_padding(height, width, (rows, columns))

    def direct(self, image: Image, variant: int = 0) -> Arrays:
        recipe = self.recipe
        resolution = best_resolution(image.height, image.width, self.metadata.resolutions)
        height, width = fitted(image.height, image.width, resolution)
        levels = centred(recipe.resized(image, (width, height)), resolution)
        edge = self.metadata.tile
        whole = recipe.values(recipe.resized(image, (edge, edge)))
        return {
            "pixel_values": np.stack([whole, *cut(recipe, levels, edge, edge)]),
            "image_sizes": np.array([image.height, image.width]),
        }


class LlavaNextModel(TiledModel, LlavaModel):
    encode_batch = 16

    @classmethod
    def check(cls, config: PretrainedConfig) -> None:
        super().check(config)
        vision = config.vision_config
        if num_image_tokens(config) != (vision.image_size // vision.patch_size) ** 2:
            raise ModelLoadError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} does not leave one feature "
                f"for each patch of this {vision.model_type}; set the one that does"
            )
        if any(edge % vision.image_size for size in _resolutions(config) for edge in size):
            raise ModelLoadError(
                f"image_grid_pinpoints of config.json must be multiples of the vision tower's {vision.image_size} "
                "pixels"
            )

    def tower(self, tiles: torch.Tensor) -> torch.Tensor:
        import torch

        config, model = self.model.config, self.model.model
        hidden = model.vision_tower(tiles, output_hidden_states=True, return_dict=True).hidden_states
        layers = config.vision_feature_layer
        chosen = torch.cat([hidden[i] for i in ([layers] if isinstance(layers, int) else layers)], dim=-1)
        if config.vision_feature_select_strategy == "default":
            chosen = chosen[:, 1:]
        features: torch.Tensor = model.multi_modal_projector(chosen)
        return features

    def rows(self, features: torch.Tensor, image: dict[str, torch.Tensor]) -> torch.Tensor:
        model: Any = self.model.model
        sizes, strategy = [image["image_sizes"].tolist()], self.model.config.vision_feature_select_strategy
        (rows,), _ = model.pack_image_features([features], sizes, strategy, image_newline=model.image_newline)
        packed: torch.Tensor = rows
        return packed


def _resolutions(config: PretrainedConfig) -> list[Size]:
    return [(int(height), int(width)) for height, width in config.image_grid_pinpoints]


FAMILY = Family(LlavaNextModel, LlavaNextPreprocessor)
