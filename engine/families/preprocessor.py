"""A family's half for the front end: it turns an image into arrays and prompt tokens, without weights.

transformers' own processors import torch and half of transformers, several hundred megabytes. Therefore what a
preprocessor learns from them is plain data (`Metadata`), which is all that another process needs. For the same reason a
family's file imports neither torch nor transformers at its top.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from engine.errors import ModelLoadError
from engine.families.pixels import ProcessorBackend, Recipe, processor_options, recipe_of, size_of, value_recipe

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

    from engine.messages import ImageInput

Arrays = dict[str, npt.NDArray[np.generic]]

GRID = "image_grid_thw"
"""Name of the tensor with an image's number of frames, and the rows and columns of its patches."""

_PROBES = ((40, 64), (129, 77), (301, 300))
"""Sizes (width, height) of the images on which our preparation is compared with transformers': upscaled, odd,
downscaled."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What replaces an image's single image token in the prompt.

    Attributes:
        token_ids: The image's tokens.
        is_embed: Which of the tokens take an encoder row, in order; None means all.
    """

    token_ids: list[int]
    is_embed: list[bool] | None = None

    @classmethod
    def marked(cls, token_ids: list[int], image_token_id: int) -> Layout:
        """Return a layout in which only the image tokens take encoder rows."""
        return cls(token_ids, [token == image_token_id for token in token_ids])


@dataclass(frozen=True, slots=True)
class PlaceholderText:
    """How an image is written in a rendered prompt.

    Attributes:
        placeholder: Text of an image when the prompt is tokenised: the image token and everything around it.
        printed: Text that the chat template prints instead, and which the placeholder replaces; None where
            the template prints the placeholder.
        texts_apart: Whether the texts around images are tokenised separately, each as a prompt of its own.
            The placeholder is then the image token alone.
    """

    placeholder: str
    printed: str | None = None
    texts_apart: bool = False


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """An image prepared for its model: its layout, and the arguments of the family's `encode`."""

    token_ids: list[int]
    tensors: Arrays
    is_embed: list[bool] | None = None


@dataclass(frozen=True)
class ModelFiles:
    """What a family may read of a model's directory.

    Attributes:
        path: The directory.
        config: The configuration as transformers reads it.
        processor: transformers' image processor.
        backend: Library whose arithmetic the processor has to use, "torchvision" or "pil".
    """

    path: str
    config: PretrainedConfig
    processor: Any
    backend: str

    @property
    def image_token_id(self) -> int:
        return int(self.config.image_token_id)

    @property
    def size(self) -> dict[str, int]:
        """The processor's size without the edges that it leaves open."""
        return size_of(self.processor)

    @property
    def recipe(self) -> Recipe | None:
        """How the processor resizes and maps levels, for families that choose the size themselves."""
        return value_recipe(self.processor, self.backend)

    @property
    def whole_recipe(self) -> Recipe | None:
        """The processor's whole recipe, with its size and crop."""
        return recipe_of(self.processor, self.backend)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        # With mistral_common installed, transformers would use Mistral's own tokenizer, which is not a fast one.
        return AutoTokenizer.from_pretrained(self.path, mistral_format=False)


class Metadata(msgspec.Struct, kw_only=True):
    """All that a preprocessor needs, as plain data. Families add fields.

    Attributes:
        image_token_id: The token that stands for an image in a rendered prompt.
        recipe: How pixels are made without transformers; None where transformers' own processor is needed.
        fingerprint: Changes whenever the same image would be prepared differently; part of the image's digest.
    """

    image_token_id: int
    recipe: Recipe | None
    fingerprint: bytes = b""


F = TypeVar("F", bound=Metadata)


class Preprocessor(ABC, Generic[F]):
    """Turns upright RGB images into arrays. `prepare` is called from several threads at once.

    The preparation of an image may depend on the rest of the prompt: `variant` numbers the `num_variants` ways.

    Attributes:
        metadata_type: The family's `Metadata`.
        tensor_names: Arrays of transformers' processor that the engine needs.
        chat_template: The template of the model's card, for families whose checkpoints have none.
        takes_embeddings: Whether clients may send rows in place of an image; each becomes one image token.
        takes_features: Whether scripts may send features of the vision tower in place of an image; the projector has
            two linear layers then.
        adds_special_tokens: Whether the tokenizer adds its own to a prompt that does not begin with one, as in most
            processors.
        max_images: Greatest number of images in a prompt; None where only its length limits them.
        probes: Sizes (width, height) of the images on which `direct` is compared with `reference`.
        num_variants: Number of ways of preparing an image.
    """

    metadata_type: ClassVar[type[Metadata]]
    tensor_names: ClassVar[tuple[str, ...]] = ("pixel_values",)
    chat_template: ClassVar[str | None] = None
    takes_embeddings: ClassVar[bool] = True
    takes_features: ClassVar[bool] = False
    adds_special_tokens: ClassVar[bool] = True
    max_images: ClassVar[int | None] = None
    probes: ClassVar[tuple[tuple[int, int], ...]] = _PROBES
    num_variants: ClassVar[int] = 1

    def __init__(self, metadata: F, processor: Any = None) -> None:
        """Create a preprocessor.

        Args:
            metadata: What `read` found.
            processor: transformers' image processor, needed where `metadata.recipe` is None.
        """
        self.metadata = metadata
        self._processor = processor

    @classmethod
    def from_model(
        cls, model_path: str, overrides: dict[str, Any] | None = None, backend: ProcessorBackend = "auto"
    ) -> Preprocessor[F]:
        """Read the model's directory with transformers, which is slow.

        Our own preparation is compared with transformers' on a few images, and used if the results are equal.

        Args:
            model_path: Directory of the model.
            overrides: Replacements for settings of the image processor.
            backend: Library whose arithmetic is used.

        Raises:
            ModelLoadError: The processor does not support this backend, or the family cannot serve the model.
        """
        from transformers import AutoConfig, AutoImageProcessor

        config = AutoConfig.from_pretrained(model_path)
        load: Any = AutoImageProcessor.from_pretrained
        processor = load(model_path, **{**processor_options(backend), **(overrides or {})})
        native = getattr(processor, "backend", "pil")
        wanted = native if backend == "auto" else backend
        metadata = cls.read(ModelFiles(model_path, config, processor, wanted))
        made = cls(metadata, processor)
        if wanted != native:
            if metadata.recipe is None:
                raise ModelLoadError("the model's image processor needs torchvision itself; install torchvision")
        elif metadata.recipe is not None and not made._direct_is_exact():
            metadata.recipe = None
        settings = json.dumps([wanted, processor.to_dict()], sort_keys=True, default=str).encode()
        known = settings + msgspec.msgpack.encode(metadata)
        metadata.fingerprint = hashlib.blake2b(known, digest_size=8).digest()
        return made

    @classmethod
    @abstractmethod
    def read(cls, model: ModelFiles) -> F:
        """Read the family's metadata.

        Raises:
            ModelLoadError: The family cannot serve this model.
        """

    @classmethod
    def from_bytes(cls, metadata: bytes) -> Preprocessor[F]:
        return cls(msgspec.msgpack.decode(metadata, type=cls.metadata_type))  # type: ignore[arg-type]

    def to_bytes(self) -> bytes | None:
        """Encode for `from_bytes` in another process; None if that would need transformers' processor."""
        return None if self.metadata.recipe is None else msgspec.msgpack.encode(self.metadata)

    @property
    def image_token_id(self) -> int:
        return self.metadata.image_token_id

    @property
    def recipe(self) -> Recipe:
        """`metadata.recipe`, for `direct`, which is called only where there is one."""
        assert self.metadata.recipe is not None
        return self.metadata.recipe

    @property
    def forbidden_token_ids(self) -> Sequence[int]:
        """Tokens that a completion may never contain, even if its grammar allows them."""
        return [self.metadata.image_token_id]

    @property
    def fingerprint(self) -> bytes:
        return self.metadata.fingerprint

    @property
    def grid_merge(self) -> int | None:
        """Patches along each side of the square that becomes one token; None where `positions` does not need the grid.

        The grid is the image's tensor `GRID`.
        """
        return None

    @abstractmethod
    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        """Return what an image of that size becomes in the prompt.

        Raises:
            RequestRejected: The image cannot be prepared.
        """

    def around(self, num_images: int) -> tuple[list[int], list[int]]:
        """Return the tokens before and after a prompt's text, for families whose images are not part of the text.

        Then nothing is written for images in the text, and the tokenizer adds no tokens. The first token
        returned is the image token.
        """
        return [], []

    def arranged(self, text: str, bos: str) -> str:
        """Complete a prompt that is not a chat, with its placeholders, as the family's processor does."""
        return text

    def written(self, tokenizer: PreTrainedTokenizerFast) -> PlaceholderText | None:
        """Return how an image is written in a rendered prompt, if that is more than the image token."""
        return None

    @abstractmethod
    def direct(self, image: Image, variant: int = 0) -> Arrays:
        """Make the arrays by `metadata.recipe`."""

    def reference(self, image: Image, variant: int = 0) -> Arrays:
        """Make the same arrays with transformers' image processor."""
        out = self._processor(images=image, return_tensors="np")
        return {name: np.asarray(out[name][0]) for name in self.tensor_names}

    def variant(self, num_images: int) -> int:
        """Return the way in which images are prepared for a prompt with `num_images` of them."""
        return 0

    def prepare(self, image: Image, variant: int = 0) -> PreparedImage:
        layout = self.layout(image.width, image.height, variant)
        tensors = (self.reference if self.metadata.recipe is None else self.direct)(image, variant)
        return PreparedImage(layout.token_ids, tensors, layout.is_embed)

    def positions(self, num_tokens: int, images: Sequence[ImageInput]) -> tuple[npt.NDArray[np.int64] | None, int]:
        """Compute the positions of a prompt's tokens.

        Returns:
            Positions [axes, num_tokens], or None for 0, 1, 2, … on every axis; and what is added to the index
                of a token after the prompt (without an array: of any token).
        """
        return None, 0

    def _direct_is_exact(self) -> bool:
        from PIL import Image

        random = np.random.default_rng(0)
        for (width, height), variant in product(self.probes, range(self.num_variants)):
            image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
            want, got = self.reference(image, variant), self.direct(image, variant)
            if want.keys() != got.keys() or not all(np.array_equal(want[name], got[name]) for name in want):
                return False
        return True


class FixedMetadata(Metadata, kw_only=True):
    """Metadata of a `FixedPreprocessor`.

    Attributes:
        num_tokens: Tokens of every image.
    """

    num_tokens: int


FF = TypeVar("FF", bound=FixedMetadata)


class FixedPreprocessor(Preprocessor[FF]):
    """Preprocessor of families in which images of every size become the same number of tokens."""

    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        return Layout([self.metadata.image_token_id] * self.metadata.num_tokens)

    def direct(self, image: Image, variant: int = 0) -> Arrays:
        return {"pixel_values": self.recipe.pixels(image)}
