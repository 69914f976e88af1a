"""Qwen3-VL: Qwen2-VL's images and positions, and DeepStack.

Some layers of the vision tower each give rows of their own, which are added to the hidden states of an
image's tokens after the first layers of the decoder (Meng et al. 2024, DeepStack). They are part of an
image's rows, after its embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.families.base import LLAMA_PLAN, Family
from engine.families.qwen2_vl import Qwen2VLModel, Qwen2VLPreprocessor

if TYPE_CHECKING:
    import torch


class Qwen3VLModel(Qwen2VLModel):
    tensor_parallel_plan = LLAMA_PLAN

    @property
    def row_size(self) -> int:
        return super().row_size * (1 + len(self.model.config.vision_config.deepstack_visual_indexes))

    def rows(self, features: Any) -> Sequence[torch.Tensor]:
        import torch

        layers = (features.pooler_output, *features.deepstack_features)
        return [torch.cat(parts, dim=1) for parts in zip(*layers, strict=True)]

    def forward(
        self,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        beyond: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kernel: Any,
    ) -> torch.Tensor:
        import torch

        if beyond is not None:
            rows, features = beyond
            shown = torch.zeros(len(embeddings), dtype=torch.bool, device=embeddings.device)
            shown[rows] = True
            kernel["visual_pos_masks"] = shown.unsqueeze(0)
            kernel["deepstack_visual_embeds"] = torch.split(features, embeddings.shape[1], dim=1)
        return super().forward(embeddings, positions, **kernel)


FAMILY = Family(Qwen3VLModel, Qwen2VLPreprocessor)
