"""Checks embeddings in place of images, so that nothing that does not fit the model reaches an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handlers.errors import ImageError
from handlers.request import EmbeddingsPart, LoadedEmbeddings

_LARGEST = {"float16": 65504.0, "bfloat16": float.fromhex("0x1.fep127")}
"""What these can hold at most, which is less than float32 can."""


@dataclass(frozen=True, slots=True)
class EmbeddingsWanted:
    """The embeddings that a model accepts.

    Attributes:
        hidden_size: The length of each row that the language model is given.
        most_tokens: The most tokens of one image.
        dtype: The model's, by torch's name.
        merge: Patches on one side of the square that becomes one token, for models that need to know how patches are
            arranged (`image_grid_thw`); None for other models.
    """

    hidden_size: int
    most_tokens: int
    dtype: str
    merge: int | None = None

    def checked(self, parts: Sequence[EmbeddingsPart]) -> list[LoadedEmbeddings]:
        """Return the tensors of the parts, which must be loaded. Raises ImageError."""
        found: list[LoadedEmbeddings] = []
        for index, part in enumerate(parts):
            assert part.loaded is not None, "loaded before the backend sees them"
            if wrong := self._wrong(part.loaded):
                raise ImageError(index, wrong)
            found.append(part.loaded)
        return found

    def _wrong(self, loaded: LoadedEmbeddings) -> str | None:
        tokens, hidden = loaded.rows.shape
        if hidden != self.hidden_size:
            return f"image_embeds has the shape [{tokens}, {hidden}]; this model wants [tokens, {self.hidden_size}]"
        if tokens > self.most_tokens:
            return (
                f"image_embeds has the shape [{tokens}, {hidden}]; this server takes at most {self.most_tokens} "
                "tokens for one image"
            )
        if loaded.largest > (most := _LARGEST.get(self.dtype, loaded.largest)):
            return f"image_embeds holds {loaded.largest:g}; the model's {self.dtype} holds at most {most:g}"
        return self._wrong_grid(loaded.grid, tokens)

    def _wrong_grid(self, grid: tuple[int, int, int] | None, tokens: int) -> str | None:
        if self.merge is None:
            return None if grid is None else "this model wants no image_grid_thw: send image_embeds alone"
        if grid is None:
            return (
                'this model wants image_grid_thw beside image_embeds: send {"image_embeds": ..., "image_grid_thw": ...}'
            )
        frames, rows, columns = grid
        if frames != 1:
            return f"image_grid_thw is {list(grid)}; an image has 1 frame"
        if rows % self.merge or columns % self.merge:
            return f"image_grid_thw is {list(grid)}; rows and columns must be multiples of {self.merge}"
        if (wanted := rows * columns // self.merge**2) != tokens:
            return f"image_grid_thw is {list(grid)}, which is {wanted} tokens; image_embeds has {tokens} rows"
        return None
