"""What differs between model families in the engine: how arrays become rows of embeddings, and how the packed row
runs through the language model. The front's half of a family is in `engine.families.preprocessor`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


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
