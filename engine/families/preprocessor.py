"""The front's half of a model family: a picture becomes arrays and placeholder tokens, without weights.

transformers' own processors import torch and half of transformers, several hundred megabytes. So a preprocessor can
write down what it learned from one of them, and another process can go on with these facts alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from engine.families.pixels import ProcessorBackend

if TYPE_CHECKING:
    from PIL.Image import Image


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

    @abstractmethod
    def facts(self) -> bytes | None:
        """All that `from_facts` needs to do the same in another process; None where transformers is needed for it."""

    @classmethod
    @abstractmethod
    def from_model(
        cls, model_path: str, overrides: dict[str, Any] | None = None, backend: ProcessorBackend = "auto"
    ) -> Preprocessor:
        """Slow: asks transformers' processor. overrides: of the processor's own settings.

        Raises ModelLoadError where the processor cannot work with this backend.
        """

    @classmethod
    @abstractmethod
    def from_facts(cls, facts: bytes) -> Preprocessor: ...
