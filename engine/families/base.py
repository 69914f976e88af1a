"""What differs between model families, and nothing else: one small file per family implements these two halves.

`Preprocessor` is the front's half (a picture becomes arrays and placeholder tokens; no weights); `Family` is the
engine's half (arrays become rows of embeddings; the packed row runs through the language model).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class PreparedPicture:
    """A picture as its model wants it.

    token_ids: what replaces the one image token in the prompt.
    is_embed: which of these take an encoder row, in order; None means all.
    tensors: the arguments of the family's `encode`.
    """

    token_ids: list[int]
    tensors: dict[str, npt.NDArray[np.generic]]
    is_embed: list[bool] | None = None


class Preprocessor(ABC):
    """Turns upright RGB pictures into arrays. `prepare` is called from several threads at once."""

    image_token_id: int
    """The one token that a template prints for a picture."""

    fingerprint: bytes
    """Changes whenever the same picture would be prepared differently; enters the picture's digest."""

    @abstractmethod
    def prepare(self, image: Image) -> PreparedPicture: ...


class Family(ABC):
    """A loaded model. Shapes: T is the number of packed tokens of a step, D the text hidden size."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    @abstractmethod
    def decoder(self) -> torch.nn.Module:
        """The language model without its head: takes `inputs_embeds`, gives `last_hidden_state`."""

    @property
    @abstractmethod
    def head(self) -> torch.nn.Module: ...

    @property
    @abstractmethod
    def text_config(self) -> PretrainedConfig: ...

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, D]; a placeholder's row is overwritten afterwards, so any row will do for it."""
        table = self.decoder.get_input_embeddings()  # type: ignore[operator]
        embedded: torch.Tensor = table(token_ids.clamp(max=table.num_embeddings - 1))
        return embedded

    def encode(self, pictures: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """One [rows, D] per picture. Text-only families are never asked."""
        raise ValueError("this model takes no pictures")

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor, **kernel: Any) -> torch.Tensor:
        """[T, D] and positions [T] through the decoder -> [T, D]."""
        out = self.decoder(
            inputs_embeds=embeddings.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            **kernel,
        )
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, D] -> [rows, vocabulary]."""
        logits: torch.Tensor = self.head(hidden)
        return logits
