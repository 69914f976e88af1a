"""PaliGemma 1 and 2: a SigLIP tower, one linear layer, and a Gemma or Gemma 2 decoder.

Attention is bidirectional within the prompt, and causal in the completion; positions begin at 1. The prompt
consists of the images, the beginning-of-sequence token, the text and a line break. A model answers one
message about one or several images.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.families.base import Family, FamilyModel
from engine.families.preprocessor import FixedMetadata, FixedPreprocessor, ModelFiles

if TYPE_CHECKING:
    from engine.messages import ImageInput

_IMAGE = "<image>"

_TEMPLATE = (
    "{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}"
    "{{ raise_exception('PaliGemma answers a single user message: send no other messages') }}"
    "{%- endif -%}"
    "{%- set ns = namespace(images=0) -%}"
    "{%- for part in messages[0]['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set ns.images = ns.images + 1 -%}{{ '<image>' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if ns.images == 0 -%}"
    "{{ raise_exception('PaliGemma answers about an image: send at least one') }}"
    "{%- endif -%}"
    "{{ bos_token }}"
    "{%- for part in messages[0]['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{{ '\n' }}"
)


class PaliGemmaPreprocessor(FixedPreprocessor[FixedMetadata]):
    metadata_type = FixedMetadata
    chat_template = _TEMPLATE
    adds_special_tokens = False

    @classmethod
    def read(cls, model: ModelFiles) -> FixedMetadata:
        vision = model.config.vision_config
        return FixedMetadata(
            image_token_id=model.image_token_id,
            recipe=model.whole_recipe,
            num_tokens=int(vision.image_size // vision.patch_size) ** 2,
        )

    def arranged(self, text: str, bos: str) -> str:
        end = text.rfind(_IMAGE) + len(_IMAGE) if _IMAGE in text else 0
        return f"{text[:end]}{bos}{text[end:]}\n"

    def positions(self, num_tokens: int, images: Sequence[ImageInput]) -> tuple[npt.NDArray[np.int64] | None, int]:
        return None, 1


class PaliGemmaModel(FamilyModel):
    special_attention = True
    spans_pass_windows = True
    encode_batch = 4

    def spans(self, token_ids: Sequence[int], images: Sequence[ImageInput]) -> list[tuple[int, int]]:
        return [(0, len(token_ids))]

    def prefix_salt(self, token_ids: Sequence[int], images: Sequence[ImageInput]) -> bytes:
        """Return a digest of the prompt: its first token sees all of it, so only equal prompts share a prefix."""
        digest = hashlib.blake2b(array("q", token_ids).tobytes(), digest_size=16)
        for image in images:
            digest.update(image.digest)
        return digest.digest()


FAMILY = Family(PaliGemmaModel, PaliGemmaPreprocessor)
