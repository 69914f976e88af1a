"""Chameleon: an image becomes discrete codes, and each code a word of the vocabulary.

The decoder is the model itself. It could also generate image words, which cannot be shown to a client: they
are never chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.families.base import LLAMA_PLAN, Family, FamilyModel
from engine.families.preprocessor import FixedMetadata, FixedPreprocessor, Layout, ModelFiles

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from engine.tensor_parallel import Ranks

_START, _END = "<racm3:break>", "<eoss>"

_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{{ sep_token }}"
    "{%- endfor -%}"
)
"""A turn ends with the separator, which the model card's processor adds after the prompt."""


class ChameleonMetadata(FixedMetadata, kw_only=True):
    start_token_id: int
    end_token_id: int
    separator: str
    image_words: list[int]


class ChameleonPreprocessor(FixedPreprocessor[ChameleonMetadata]):
    metadata_type = ChameleonMetadata
    chat_template = _TEMPLATE
    takes_embeddings = False

    @classmethod
    def read(cls, model: ModelFiles) -> ChameleonMetadata:
        words, codes = model.config.vocabulary_map, model.config.vq_config
        edge = codes.resolution // 2 ** (len(codes.channel_multiplier) - 1)
        return ChameleonMetadata(
            image_token_id=model.image_token_id,
            recipe=model.whole_recipe,
            num_tokens=edge**2,
            start_token_id=words[_START],
            end_token_id=words[_END],
            separator=model.tokenizer.sep_token or "",
            image_words=sorted(number for word, number in words.items() if word.startswith("IMGIMG")),
        )

    @property
    def forbidden_token_ids(self) -> Sequence[int]:
        return [self.metadata.image_token_id, *self.metadata.image_words]

    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        metadata = self.metadata
        images = [metadata.image_token_id] * metadata.num_tokens
        token_ids = [metadata.start_token_id, *images, metadata.end_token_id]
        return Layout.marked(token_ids, metadata.image_token_id)

    def arranged(self, text: str, bos: str) -> str:
        return text + self.metadata.separator


class ChameleonModel(FamilyModel):
    decoder_types = None
    encode_batch = 1
    tensor_parallel_plan = LLAMA_PLAN

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        # The nearest code should not depend on the precision in which the model computes.
        model.model.vqmodel.float()
        self._image_words = model.model.vocabulary_mapping.image_tokens

    def shard(self, ranks: Ranks) -> None:
        import torch

        super().shard(ranks)
        for layer in self.decoder.layers:  # type: ignore[union-attr]
            attention = layer.self_attn
            attention.num_heads //= ranks.size
            attention.num_key_value_heads //= ranks.size
            for norm in (attention.q_norm, attention.k_norm):
                for name in ("weight", "bias"):
                    part = getattr(norm, name).data.chunk(ranks.size)[ranks.rank].clone()
                    setattr(norm, name, torch.nn.Parameter(part, requires_grad=False))

    def encode(self, images: Sequence[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        import torch

        pixels = torch.stack([image["pixel_values"] for image in images])
        return list(self.features(pixel_values=pixels.float()))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        import torch

        logits = super().logits(hidden)
        logits[:, self._image_words] = torch.finfo(logits.dtype).min
        return logits


FAMILY = Family(ChameleonModel, ChameleonPreprocessor)
