"""Phi-3 Vision and Phi-3.5 Vision: a CLIP tower that sees tiles, and a Phi-3 decoder.

transformers has no class for it, and the checkpoints contain their own code, which is not run: the model is assembled
here from transformers' CLIP and Phi-3. An image fills as many tiles of one size as its aspect allows: it is resized to
their whole width (or height, if it is upright), padded with white, and cut. Four patches become one row, a learned
separator ends each line of rows, and the whole image, shrunk to one tile, comes last.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import numpy as np
import numpy.typing as npt
from PIL.Image import Resampling, Transpose

from engine.errors import ModelLoadError
from engine.families.base import Family, FamilyModel
from engine.families.pixels import Pixels, ProcessorBackend, Recipe
from engine.families.preprocessor import Arrays, Layout, Metadata, ModelFiles, PlaceholderText, Preprocessor
from engine.families.tiles import TiledModel

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig, PreTrainedModel

IMAGE_TOKEN = "<|image|>"
"""A token of the tokenizer that occurs in no text; the checkpoint's processor writes negative numbers instead."""

_CLIP = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
_BILINEAR, _TRANSPOSE = Resampling.BILINEAR, Transpose.TRANSPOSE
_WHITE = 255


class Phi3VMetadata(Metadata, kw_only=True):
    """Metadata of a Phi-3 Vision model.

    Attributes:
        tile: Edge of a tile in pixels.
        most: Greatest number of tiles of an image, without the whole image.
        lines: Lines of rows in a tile, and rows in such a line.
    """

    tile: int
    most: int
    lines: int


class Phi3VPreprocessor(Preprocessor[Phi3VMetadata]):
    metadata_type = Phi3VMetadata

    @classmethod
    def from_model(
        cls, model_path: str, overrides: dict[str, Any] | None = None, backend: ProcessorBackend = "auto"
    ) -> Preprocessor[Phi3VMetadata]:
        """Read the model's directory.

        `backend` is ignored, since the checkpoint's processor always resizes with Pillow.
        """
        from transformers import AutoConfig

        register()
        try:
            stored = json.loads(Path(model_path, "preprocessor_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelLoadError("preprocessor_config.json of the model cannot be read") from error
        metadata = cls.read(
            ModelFiles(model_path, AutoConfig.from_pretrained(model_path), {**stored, **(overrides or {})}, "pil")
        )
        metadata.fingerprint = hashlib.blake2b(msgspec.msgpack.encode(metadata), digest_size=8).digest()
        return cls(metadata)

    @classmethod
    def read(cls, model: ModelFiles) -> Phi3VMetadata:
        """Read the family's metadata; `model.processor` is the content of preprocessor_config.json."""
        vision, vocabulary = model.config.vision_config, model.tokenizer.get_vocab()
        if IMAGE_TOKEN not in vocabulary:
            raise ModelLoadError(f"its tokenizer has no {IMAGE_TOKEN}")
        most = model.processor.get("num_crops", 1)
        if not isinstance(most, int) or most < 1:
            raise ModelLoadError(f"num_crops of its image processor is {most!r}; it must be 1 or more")
        return Phi3VMetadata(
            image_token_id=vocabulary[IMAGE_TOKEN],
            recipe=Recipe({}, None, _BILINEAR, False, _value_table(model.processor).tobytes()),
            tile=int(vision.image_size),
            most=most,
            lines=vision.image_size // vision.patch_size // 2,
        )

    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        lines, (down, across) = self.metadata.lines, self._grid(width, height)
        count = down * lines * (across * lines + 1) + 1 + lines * (lines + 1)
        return Layout([self.metadata.image_token_id] * count)

    def written(self, tokenizer: Any) -> PlaceholderText:
        """Tokenise the texts between images separately, as the checkpoint's processor does."""
        return PlaceholderText(IMAGE_TOKEN, texts_apart=True)

    def direct(self, image: Image, variant: int = 0) -> Arrays:
        metadata = self.metadata
        recipe, tile = metadata.recipe, metadata.tile
        assert recipe is not None
        down, across = self._grid(*image.size)
        width, height = self._resized(*image.size)
        if width < height:  # Pillow rounds between its two passes, and the reference turns upright images first
            levels = recipe.resized(image.transpose(_TRANSPOSE), (height, width)).transpose(1, 0, 2)
        else:
            levels = recipe.resized(image, (width, height))
        spare = (down * tile - levels.shape[0], across * tile - levels.shape[1])
        around = [(extra // 2, extra - extra // 2) for extra in spare]
        levels = np.pad(levels, (*around, (0, 0)), constant_values=_WHITE)
        pixels = recipe.values(levels)
        tiles = pixels.reshape(3, down, tile, across, tile).transpose(1, 3, 0, 2, 4)
        whole = _shrunk(_shrunk(pixels, 2, tile), 1, tile)
        return {
            "pixel_values": np.concatenate([whole[None], tiles.reshape(-1, 3, tile, tile)]),
            "grid": np.array([down, across]),
        }

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """(down, across) in tiles."""
        tile = self.metadata.tile
        width, height = self._resized(width, height)
        return -(-height // tile), -(-width // tile)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height): as many tiles along the longer edge as `most` allows; the other edge keeps the aspect."""
        longer, shorter = max(width, height), min(width, height)
        aspect = longer / shorter
        along = 1
        while (along + 1) * math.ceil((along + 1) / aspect) <= self.metadata.most:
            along += 1
        longer = along * self.metadata.tile
        shorter = max(int(longer / aspect), 1)
        return (longer, shorter) if width >= height else (shorter, longer)


def _value_table(settings: dict[str, Any]) -> npt.NDArray[np.float32]:
    """[3, 256]: the value of each 8-bit level."""
    mean, std = (np.asarray(settings.get(name) or _CLIP[name], np.float32)[:, None] for name in _CLIP)
    table: npt.NDArray[np.float32] = (np.arange(256, dtype=np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(table)


def _shrunk(pixels: Pixels, axis: int, size: int) -> Pixels:
    """Shrink an axis by a whole factor, as torch's bicubic `interpolate` does, which does not smooth.

    Of each run of pixels, an odd one is reduced to its middle pixel, and an even one to the four in its
    middle, added in torch's order and rounding each product once.
    """
    length = pixels.shape[axis]
    factor = length // size
    first = np.arange(size) * factor + (factor - 1) // 2
    if factor % 2:
        middle: Pixels = pixels.take(first, axis)
        return middle
    total: Any = np.float32(0)
    for offset, weight in _HALF_WAY:
        tap = pixels.take((first + offset).clip(0, length - 1), axis)
        total = (tap.astype(np.float64) * weight + total).astype(np.float32)
    shrunk: Pixels = total
    return shrunk


_HALF_WAY = ((0, 0.59375), (-1, -0.09375), (1, 0.59375), (2, -0.09375))
"""Pixels and their weights in the cubic convolution (Keys 1981, a = -0.75) half-way between the first and the next."""


class Phi3VModel(TiledModel):
    auto_class = "AutoModelForCausalLM"
    decoder_types = None

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        vision: Any = self.decoder.vision_embed_tokens
        self.vision = vision
        # Layers after the one whose output is used are neither computed nor kept.
        encoder = vision.img_processor.encoder
        last = model.config.img_processor.get("layer_idx", -2) % (len(encoder.layers) + 1)
        encoder.layers = encoder.layers[:last]

    @classmethod
    def check(cls, config: PretrainedConfig) -> None:
        vision, tower, joined = config.vision_config, config.img_processor, config.embd_layer
        for name, value, supported in (
            ("img_processor.name", tower.get("name"), "clip_vision_model"),
            ("img_processor.type_feature", tower.get("type_feature", "patch"), "patch"),
            ("img_processor.image_dim_out", tower.get("image_dim_out"), vision.hidden_size),
            ("embd_layer.hd_transform_order", joined.get("hd_transform_order"), "sub_glb"),
            ("embd_layer.use_hd_transform", joined.get("use_hd_transform"), True),
            ("embd_layer.with_learnable_separator", joined.get("with_learnable_separator"), True),
            ("embd_layer.projection_cls", joined.get("projection_cls"), "mlp"),
        ):
            if value != supported:
                raise ModelLoadError(f"{name} of this Phi-3 Vision is {value!r}; supported: {supported!r}")
        layer, count = tower.get("layer_idx", -2), vision.num_hidden_layers
        if not isinstance(layer, int) or not -count - 1 <= layer <= count:
            raise ModelLoadError(
                f"img_processor.layer_idx of this Phi-3 Vision is {layer!r}, but its tower has {count} layers"
            )
        if vision.image_size % (2 * vision.patch_size):
            raise ModelLoadError(
                f"its tiles of {vision.image_size} pixels are not an even number of patches of {vision.patch_size}"
            )

    @classmethod
    def load(cls, model_path: str, config: PretrainedConfig, **options: Any) -> FamilyModel:
        return super().load(model_path, config, key_mapping=HUB_NAMES, **options)

    def tower(self, tiles: torch.Tensor) -> torch.Tensor:
        seen: torch.Tensor = self.vision.img_processor(tiles).last_hidden_state
        return seen[:, 1:]

    def rows(self, features: torch.Tensor, image: dict[str, torch.Tensor]) -> torch.Tensor:
        rows: torch.Tensor = self.vision(features, *image["grid"].tolist())
        return rows


HUB_NAMES = {
    r"^model\.vision_embed_tokens\.img_processor\.vision_model\.": "model.vision_embed_tokens.img_processor.",
    r"^model\.vision_embed_tokens\.wte\.": "model.embed_tokens.",
}
"""Names of weights in the checkpoints -> names of weights here."""


@cache
def classes() -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """Derive the classes of configuration and model from transformers' Phi-3 classes, when they are first needed."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3ForCausalLM

    class Phi3VConfig(Phi3Config):  # type: ignore[no-untyped-call]
        """Phi3Config with `img_processor` and `embd_layer` as in the checkpoints.

        `vision_config` is CLIP ViT-L/14 with 336 pixels if config.json has none, as in all published models.
        """

        model_type = "phi3_v"
        sub_configs: ClassVar[dict[str, Any]] = {"vision_config": CLIPVisionConfig}

        vision_config: Any = None
        img_processor: Any = None
        embd_layer: Any = None

        def __post_init__(self, **kwargs: Any) -> None:
            if not isinstance(self.vision_config, CLIPVisionConfig):
                self.vision_config = CLIPVisionConfig(**(self.vision_config or _CLIP_L_336))
            self.img_processor = self.img_processor or {}
            self.embd_layer = self.embd_layer or {}
            scaling = kwargs.get("rope_scaling") or {}
            if scaling.get("type") == "su":
                # An older name, for which Phi3Config does not set the original length.
                kwargs["rope_scaling"] = {**scaling, "type": "longrope"}
            super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    class ImageEmbedding(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            vision, width = config.vision_config, config.hidden_size
            self.img_processor = CLIPVisionModel(vision)
            self.glb_GN = torch.nn.Parameter(torch.zeros(1, 1, 4 * vision.hidden_size))
            self.sub_GN = torch.nn.Parameter(torch.zeros(1, 1, 1, 4 * vision.hidden_size))
            self.img_projection = torch.nn.Sequential(
                torch.nn.Linear(4 * vision.hidden_size, width), torch.nn.GELU(), torch.nn.Linear(width, width)
            )

        def forward(self, patches: torch.Tensor, down: int, across: int) -> torch.Tensor:
            """Map [1 + down x across, patches, C], the whole image first, to [rows, D]."""
            lines = math.isqrt(patches.shape[1]) // 2
            merged = patches.view(-1, lines, 2, lines, 2, patches.shape[-1]).transpose(2, 3).flatten(3)
            tiles = merged[1:].view(down, across, lines, lines, -1).transpose(1, 2).flatten(2, 3).flatten(0, 1)
            rows = torch.cat([self._lines(tiles), self.glb_GN[0], self._lines(merged[0])])
            projected: torch.Tensor = self.img_projection(rows)
            return projected

        def _lines(self, rows: torch.Tensor) -> torch.Tensor:
            """[lines, rows in each, C] with the separator at the end of each -> [.., C]."""
            return torch.cat([rows, self.sub_GN[0].expand(len(rows), -1, -1)], dim=1).flatten(0, 1)

    class Phi3VForCausalLM(Phi3ForCausalLM):  # type: ignore[no-untyped-call]
        config_class = Phi3VConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)  # type: ignore[no-untyped-call]
            self.model.vision_embed_tokens = ImageEmbedding(config)
            self.post_init()  # type: ignore[no-untyped-call]

    return Phi3VConfig, Phi3VForCausalLM


_CLIP_L_336 = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip


def register() -> None:
    """Let transformers read this family's config.json without the code that comes with the checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config, model = classes()
    AutoConfig.register("phi3_v", config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)


FAMILY = Family(Phi3VModel, Phi3VPreprocessor, register)
