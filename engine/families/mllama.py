"""Llama 3.2 Vision: images are not rows of the prompt; some of the decoder's layers attend to them.

Each image is cut into up to four tiles. The keys and values that the cross-attention layers need are computed
once and kept as the image's encoder output, so a step only looks them up. An image token sees its image, and
so do the tokens after it up to the next image; adjacent images are seen together. Tokens before the first
image see all rows of all images, also those of padding tiles, but skip the layer's MLP: transformers treats a
row with an empty mask in this way, and the model was trained with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.families.base import LLAMA_PLAN, AttendedChunk, CacheLayout, Family, FamilyModel
from engine.families.pixels import Recipe
from engine.families.preprocessor import Arrays, Layout, Metadata, ModelFiles, Preprocessor

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig, PreTrainedModel

    from engine.messages import ImageInput
    from engine.tensor_parallel import Ranks

_TP_PLAN = LLAMA_PLAN | {
    name.replace("self_attn", "cross_attn"): style for name, style in LLAMA_PLAN.items() if "self_attn" in name
}

_FEW_QUERIES = 8
"""Up to this number two batched matrix products are faster than `scaled_dot_product_attention` on a CPU."""


class MllamaMetadata(Metadata, kw_only=True):
    image_token: str
    tile_size: int
    max_tiles: int


class MllamaPreprocessor(Preprocessor[MllamaMetadata]):
    metadata_type = MllamaMetadata
    tensor_names = ("pixel_values", "aspect_ratio_ids")
    takes_embeddings = False
    adds_special_tokens = False
    probes = ((40, 64), (129, 77), (301, 300), (500, 17), (17, 500))

    @classmethod
    def read(cls, model: ModelFiles) -> MllamaMetadata:
        return MllamaMetadata(
            image_token_id=model.image_token_id,
            image_token=str(model.tokenizer.convert_ids_to_tokens(int(model.config.image_token_id))),
            recipe=model.recipe,
            tile_size=int(model.processor.size["height"]),
            max_tiles=int(model.processor.max_image_tiles),
        )

    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        return Layout([self.metadata.image_token_id], [False])

    def arranged(self, text: str, bos: str) -> str:
        """Put the beginning-of-sequence token after leading images."""
        if bos in text:
            return text
        rest = text
        while rest.startswith(self.metadata.image_token):
            rest = rest.removeprefix(self.metadata.image_token)
        return text[: len(text) - len(rest)] + bos + rest

    def direct(self, image: Image, variant: int = 0) -> Arrays:
        recipe = self.recipe
        rows, columns = self._grid(image.width, image.height)
        levels = self._canvas(image, rows, columns, recipe)
        size = self.metadata.tile_size
        tiles = recipe.values(levels).reshape(3, rows, size, columns, size).transpose(1, 3, 0, 2, 4)
        return {
            "pixel_values": tiles.reshape(rows * columns, 3, size, size),
            "aspect_ratio_ids": np.array(self._grids().index((rows, columns)) + 1),
        }

    def reference(self, image: Image, variant: int = 0) -> Arrays:
        out = self._processor(images=[[image]], return_tensors="np")
        tiles = int(out["num_tiles"][0][0])
        return {
            "pixel_values": np.asarray(out["pixel_values"][0][0][:tiles]),
            "aspect_ratio_ids": np.asarray(out["aspect_ratio_ids"][0][0]),
        }

    def _grids(self) -> list[tuple[int, int]]:
        """(rows, columns) of tiles, in the order of the aspect ratio ids."""
        most = self.metadata.max_tiles
        return [(r, c) for r in range(1, most + 1) for c in range(1, most + 1) if r * c <= most]

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """The grid that enlarges the image least, or shrinks it least where all shrink it; of equals the smaller."""
        size = self.metadata.tile_size
        scales = [(min(r * size / height, c * size / width), (r, c)) for r, c in self._grids()]
        larger = [scale for scale, _ in scales if scale >= 1]
        wanted = min(larger) if larger else max(scale for scale, _ in scales)
        return min((grid for scale, grid in scales if scale == wanted), key=lambda grid: grid[0] * grid[1])

    def _canvas(self, image: Image, rows: int, columns: int, recipe: Recipe) -> np.ndarray:
        """The image as large as the grid allows, in its upper left corner; the rest is black."""
        size = self.metadata.tile_size
        width, height = (
            min(max(edge, size), most * size) for edge, most in ((image.width, columns), (image.height, rows))
        )
        across, down = width / image.width, height / image.height
        if across < down:
            height = min(math.floor(image.height * across) or 1, height)
        else:
            width = min(math.floor(image.width * down) or 1, width)
        canvas = np.zeros((rows * size, columns * size, 3), dtype=np.uint8)
        canvas[:height, :width] = recipe.resized(image, (width, height))
        return canvas


@dataclass(frozen=True, slots=True)
class CrossStates:
    """What the cross-attention layers see of an image.

    Attributes:
        states: [cross-attention layers, 2 (keys, values), kv_heads, rows, head_dim].
        visible: Number of leading rows that belong to real tiles; the others are padding.
    """

    states: torch.Tensor
    visible: int

    @property
    def nbytes(self) -> int:
        return self.states.nbytes

    def clone(self) -> CrossStates:
        return CrossStates(self.states.clone(), self.visible)


@dataclass(frozen=True, slots=True)
class _Segment:
    """Rows [start, stop) of the attending rows, which see the same keys.

    Attributes:
        blind: Whether they come before the first image.
    """

    start: int
    stop: int
    seen: tuple[tuple[CrossStates, int], ...]
    blind: bool


class MllamaModel(FamilyModel):
    decoder_types = None
    attends_images = True
    encode_batch = 1
    tensor_parallel_plan = _TP_PLAN

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        # The key/value cache has layers for self-attention only; transformers counts all of them.
        attention = (layer.self_attn for layer in self._layers if hasattr(layer, "self_attn"))
        for number, module in enumerate(attention):
            module.layer_idx = number

    def shard(self, ranks: Ranks) -> None:
        super().shard(ranks)
        for layer in self._layers:
            attention = layer.self_attn if hasattr(layer, "self_attn") else layer.cross_attn
            attention.num_heads //= ranks.size
            attention.num_key_value_heads //= ranks.size

    @classmethod
    def cache_layout(cls, config: PretrainedConfig) -> CacheLayout:
        text, vision = config.text_config, config.vision_config
        whole = CacheLayout.of(text)
        crossing = len(text.cross_attention_layers)
        rows = vision.max_num_tiles * ((vision.image_size // vision.patch_size) ** 2 + 1)
        return CacheLayout(
            num_layers=whole.num_layers - crossing,
            query_heads=whole.query_heads,
            kv_heads=whole.kv_heads,
            head_dim=whole.head_dim,
            image_values=rows * crossing * 2 * whole.kv_heads * whole.head_dim,
        )

    def encode(self, images: Sequence[dict[str, torch.Tensor]]) -> list[Any]:
        import torch

        vision, dtype = self.model.config.vision_config, self.model.dtype
        counts = [len(image["pixel_values"]) for image in images]
        first = images[0]["pixel_values"]
        pixels = first.new_zeros((len(images), 1, vision.max_num_tiles, *first.shape[1:]), dtype=dtype)
        mask = torch.zeros((len(images), 1, vision.max_num_tiles), dtype=torch.long, device=first.device)
        for number, (image, count) in enumerate(zip(images, counts, strict=True)):
            pixels[number, 0, :count] = image["pixel_values"].to(dtype)
            mask[number, 0, :count] = 1
        inner = self.model.model
        features = inner.vision_model(
            pixel_values=pixels,
            aspect_ratio_ids=torch.stack([image["aspect_ratio_ids"] for image in images])[:, None],
            aspect_ratio_mask=mask,
        ).last_hidden_state
        rows = inner.multi_modal_projector(features).flatten(1, 3)
        states = torch.stack([self._cross_states(layer.cross_attn, rows) for layer in self._crossing()], 1)
        patches = rows.shape[1] // vision.max_num_tiles
        return [CrossStates(own, count * patches) for own, count in zip(states, counts, strict=True)]

    @property
    def _layers(self) -> list[Any]:
        layers: Any = self.decoder.layers
        return list(layers)

    def _crossing(self) -> list[Any]:
        return [layer for layer in self._layers if hasattr(layer, "cross_attn")]

    def _cross_states(self, attention: Any, rows: torch.Tensor) -> torch.Tensor:
        """[images, rows, D] -> [images, 2, kv_heads, rows, head_dim]."""
        import torch

        heads = (*rows.shape[:2], -1, attention.head_dim)
        keys = attention.k_norm(attention.k_proj(rows).view(heads).transpose(1, 2))
        return torch.stack([keys, attention.v_proj(rows).view(heads).transpose(1, 2)], 1)

    def forward(
        self,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        *,
        attended: Sequence[AttendedChunk] = (),
        **kernel: Any,
    ) -> torch.Tensor:
        import torch

        hidden = embeddings[None]
        rotary = self.decoder.rotary_emb(hidden, positions[None])  # type: ignore[operator]
        segments, places = _segments(attended)
        if segments:
            where = torch.tensor(places, dtype=torch.long, device=embeddings.device)
        crossing = 0
        for layer in self._layers:
            if hasattr(layer, "self_attn"):
                hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, **kernel)
                continue
            if segments:
                hidden[0, where] = self._cross(layer, crossing, hidden[0, where], segments)
            crossing += 1
        out: torch.Tensor = self.decoder.norm(hidden)[0]  # type: ignore[operator]
        return out

    def _cross(self, layer: Any, number: int, hidden: torch.Tensor, segments: Sequence[_Segment]) -> torch.Tensor:
        """Run hidden states [attending rows, D] through cross-attention layer number `number`."""
        attention = layer.cross_attn
        query = attention.q_proj(layer.input_layernorm(hidden))
        query = attention.q_norm(query.view(len(hidden), -1, attention.head_dim))
        out = query.new_empty(query.shape)
        for segment in segments:
            span = slice(segment.start, segment.stop)
            out[span] = _attend(query[span], segment.seen, number, attention.scaling)
        hidden = hidden + layer.cross_attn_attn_gate.tanh() * attention.o_proj(out.flatten(1))
        forward = layer.mlp(layer.post_attention_layernorm(hidden)) * layer.cross_attn_mlp_gate.tanh()
        for segment in segments:
            if segment.blind:
                forward[segment.start : segment.stop] = 0
        mixed: torch.Tensor = hidden + forward
        return mixed

    def prefix_salt(self, token_ids: Sequence[int], images: Sequence[ImageInput]) -> bytes:
        """Return the digests of all images, if tokens before the first image see them."""
        if not images or images[0].offset == 0:
            return b""
        return b"".join(image.digest for image in images)


def _segments(attended: Sequence[AttendedChunk]) -> tuple[list[_Segment], list[int]]:
    """Return what the rows of a step with images see, and the indices of these rows in the step."""
    segments: list[_Segment] = []
    places: list[int] = []
    for chunk in attended:
        base = len(places) - chunk.start
        places += range(chunk.row, chunk.row + chunk.stop - chunk.start)
        offsets = [image.offset for image in chunk.images]
        everything = tuple((states, states.states.shape[3]) for states in chunk.features)
        spans = [(0, offsets[0], everything, True)]
        first = 0
        for number, offset in enumerate(offsets):
            if number and offset != offsets[number - 1] + 1:
                first = number
            seen = tuple((states, states.visible) for states in chunk.features[first : number + 1])
            spans.append((offset, (*offsets, chunk.stop)[number + 1], seen, False))
        for start, stop, seen, blind in spans:
            start, stop = max(start, chunk.start), min(stop, chunk.stop)
            if start < stop:
                segments.append(_Segment(base + start, base + stop, seen, blind))
    return segments, places


def _attend(query: torch.Tensor, seen: Sequence[tuple[CrossStates, int]], layer: int, scale: float) -> torch.Tensor:
    """Attend queries [queries, heads, head_dim] to the first rows of each image; the result has the same shape."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    parts = [states.states[layer, :, :, :rows] for states, rows in seen]
    keys, values = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    count, heads, dim = query.shape
    if count > _FEW_QUERIES:
        out = scaled_dot_product_attention(
            query.transpose(0, 1)[None], keys[None], values[None], scale=scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    groups = heads // len(keys)
    grouped = query.view(count, len(keys), groups, dim).transpose(0, 1).reshape(len(keys), -1, dim)
    weights = torch.softmax((torch.bmm(grouped, keys.transpose(1, 2)) * scale).float(), -1)
    out = torch.bmm(weights.to(values.dtype), values)
    return out.view(len(keys), count, groups, dim).transpose(0, 1).reshape(count, heads, dim)


FAMILY = Family(MllamaModel, MllamaPreprocessor)
