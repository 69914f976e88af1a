"""A model family in two halves: `Preprocessor` for the front end, `FamilyModel` for the engine.

The front end's half turns an image into arrays and prompt tokens, without weights. transformers' own
processors import torch and half of transformers, several hundred megabytes. Therefore what a preprocessor
learns from them is plain data (`Metadata`), which is all that another process needs. For the same reason a
family's file imports neither torch nor transformers at its top.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from engine.errors import ModelLoadError
from engine.families.pixels import DirectPixels, ProcessorBackend, Recipe, processor_options
from engine.weights import JUDGED, complete

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from engine.fused import FusedDecoder
    from engine.messages import ImageInput
    from engine.scheduler import ImagePlace
    from engine.tensor_parallel import Ranks

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
        fingerprint: Changes whenever the same image would be prepared differently; part of the image's
            digest.
    """

    image_token_id: int
    recipe: Recipe | None
    fingerprint: bytes = b""


F = TypeVar("F", bound=Metadata)


class Preprocessor(ABC, Generic[F]):
    """Turns upright RGB images into arrays. `prepare` is called from several threads at once.

    The preparation of an image may depend on the rest of the prompt: `variant` numbers the `num_variants`
    ways.

    Attributes:
        metadata_type: The family's `Metadata`.
        tensor_names: Arrays of transformers' processor that the engine needs.
        chat_template: The template of the model's card, for families whose checkpoints have none.
        takes_embeddings: Whether clients may send rows in place of an image; each becomes one image token.
        takes_features: Whether scripts may send features of the vision tower in place of an image; the projector has
            two linear layers then.
        adds_special_tokens: Whether the tokenizer adds its own to a prompt that does not begin with one, as
            in most processors.
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
                raise ModelLoadError(
                    "the model's image processor needs torchvision itself; install torchvision"
                )
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
    def forbidden_token_ids(self) -> Sequence[int]:
        """Tokens that a completion may never contain, whatever its grammar allows."""
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
        """Return tokens before and after those of a prompt's text, for families whose images are not part of the text.

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

    def positions(
        self, num_tokens: int, images: Sequence[ImageInput]
    ) -> tuple[npt.NDArray[np.int64] | None, int]:
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
    """Preprocessor of families in which every image becomes the same number of tokens, whatever its size."""

    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        return Layout([self.metadata.image_token_id] * self.metadata.num_tokens)

    def direct(self, image: Image, variant: int = 0) -> Arrays:
        assert self.metadata.recipe is not None
        return {"pixel_values": DirectPixels(self.metadata.recipe)(image)}


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """What the key/value cache holds for a token: num_layers x 2 x kv_heads x head_dim values.

    Attributes:
        num_layers: Layers with a cache.
        query_heads: Heads of queries.
        kv_heads: Heads of keys and values.
        head_dim: Size of a head.
        image_values: Values kept for each image of a running request, in addition to its tokens.
    """

    num_layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    image_values: int = 0

    @property
    def token_values(self) -> int:
        return self.num_layers * 2 * self.kv_heads * self.head_dim

    @classmethod
    def of(cls, text: PretrainedConfig) -> CacheLayout:
        heads: int = text.num_attention_heads
        return cls(
            num_layers=text.num_hidden_layers,
            query_heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        )


LLAMA_PLAN = {
    **{f"layers.*.self_attn.{name}_proj": "colwise" for name in ("q", "k", "v")},
    "layers.*.self_attn.o_proj": "rowwise",
    **{f"layers.*.mlp.{name}_proj": "colwise" for name in ("gate", "up")},
    "layers.*.mlp.down_proj": "rowwise",
}
"""`FamilyModel.tensor_parallel_plan` for decoders with Llama's names for which transformers has no plan."""


@dataclass(frozen=True, slots=True)
class AttendedChunk:
    """A chunk of a sequence with images, for a family whose tokens attend to images.

    Attributes:
        row: Row of its first token in the step.
        start: Index of its first token in the sequence.
        stop: Index after its last token.
        images: All images of the sequence, in order.
        features: Their encoder outputs.
    """

    row: int
    start: int
    stop: int
    images: Sequence[ImagePlace]
    features: Sequence[Any]


class FamilyModel:
    """A loaded model. In shapes, T is the number of packed tokens of a step, and D the text hidden size.

    The defaults are those of a model that contains a `language_model`, and whose images become rows of its
    input.

    Attributes:
        auto_class: transformers' class that loads the weights.
        position_axes: Number of axes of positions that the rotary embedding uses.
        attends_images: Whether the decoder's tokens attend to images, whose encoder outputs are then needed
            in every step of a request. Otherwise the outputs replace embeddings.
        spans_pass_windows: Whether a sliding window hides nothing within a span (see `spans`).
        encode_batch: Greatest number of images encoded in one call, which bounds the memory of the tower's
            activations.
        tensor_parallel_plan: How ranks share the decoder (see `engine.tensor_parallel`), where transformers
            does not define it.
    """

    auto_class: ClassVar[str] = "AutoModelForImageTextToText"
    position_axes: ClassVar[int] = 1
    attends_images: ClassVar[bool] = False
    spans_pass_windows: ClassVar[bool] = False
    encode_batch: ClassVar[int] = 16
    tensor_parallel_plan: ClassVar[Mapping[str, str] | None] = None

    def __init__(self, model: PreTrainedModel) -> None:
        from engine.long_rope import LongRope

        self.model = model
        self.long_rope = LongRope.of(self.decoder)
        self.fused: FusedDecoder | None = None

    @classmethod
    def check(cls, config: PretrainedConfig) -> None:
        """Check that this model of the family can be served.

        Raises:
            ModelLoadError: It cannot.
        """

    @classmethod
    def load(cls, model_path: str, config: PretrainedConfig, **options: Any) -> FamilyModel:
        """Load the weights; `options` are passed to transformers' `from_pretrained`."""
        import transformers

        loader = getattr(transformers, cls.auto_class)
        options["attn_implementation"] = cls.attention(config)
        return cls(complete(loader.from_pretrained(model_path, **options, **JUDGED)))

    @classmethod
    def attention(cls, config: PretrainedConfig) -> str | dict[str, str]:
        """Choose our attention for the decoder, and PyTorch's for the vision tower."""
        from engine.attention.bridge import IMPLEMENTATION

        if "text_config" not in config.sub_configs:
            return IMPLEMENTATION
        return {name: IMPLEMENTATION if name == "text_config" else "sdpa" for name in config.sub_configs}

    @classmethod
    def check_ranks(cls, config: PretrainedConfig, size: int) -> None:
        """Check that `size` ranks can share the model.

        Raises:
            ModelLoadError: They cannot.
        """
        from engine.tensor_parallel import read_plan

        read_plan(config.get_text_config(), size, cls.tensor_parallel_plan)

    def shard(self, ranks: Ranks) -> None:
        """Keep this rank's part of the weights."""
        from engine.tensor_parallel import shard

        shard(self.decoder, self.text_config, ranks, self.tensor_parallel_plan)

    @property
    def text_config(self) -> PretrainedConfig:
        config: PretrainedConfig = self.model.config.text_config
        return config

    @classmethod
    def cache_layout(cls, config: PretrainedConfig) -> CacheLayout:
        return CacheLayout.of(config.get_text_config())

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph of a decode step is right for later steps: the CPU reads no values in `forward`.

        transformers reads the greatest position where the rotary frequencies depend on it.
        """
        kind = str(getattr(getattr(self.decoder, "rotary_emb", None), "rope_type", ""))
        return "dynamic" not in kind and "longrope" not in kind

    @property
    def special_attention(self) -> bool:
        """Whether the kernel must support spans, or caps of attention scores."""
        return bool(getattr(self.text_config, "attn_logit_softcapping", None))

    def spans(self, token_ids: Sequence[int], images: Sequence[ImageInput]) -> list[tuple[int, int]]:
        """Return runs [start, stop) of a prompt with bidirectional attention. Each is computed in one step."""
        return []

    @property
    def decoder(self) -> torch.nn.Module:
        """The language model without its head; it maps `inputs_embeds` to `last_hidden_state`."""
        decoder: torch.nn.Module = self.model.model.language_model
        return decoder

    @property
    def head(self) -> torch.nn.Module:
        head: torch.nn.Module = self.model.lm_head
        return head

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Map tokens [T] to [T, D]. The row of a placeholder is overwritten later, so any row will do."""
        table = self.decoder.get_input_embeddings()  # type: ignore[operator]
        embedded: torch.Tensor = table(token_ids.clamp(max=table.num_embeddings - 1))
        return embedded

    @property
    def row_size(self) -> int:
        """Length of each row of `encode`: D, or more where `forward` takes what is beyond D."""
        return int(self.text_config.hidden_size)

    def encode(self, images: Sequence[dict[str, torch.Tensor]]) -> list[Any]:
        """Encode images; text-only families are never asked to.

        Args:
            images: Tensors of each image's `PreparedImage`.

        Returns:
            One `EncoderOutput` per image: rows [rows, row_size], unless the family's own `forward` uses
                another form.
        """
        import torch

        pixels = torch.stack([image["pixel_values"] for image in images]).to(self.model.dtype)
        return list(self.model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor, **kernel: Any) -> torch.Tensor:
        """Run the decoder.

        Args:
            embeddings: [T, D].
            positions: [T], or [position_axes, T] if there are several axes.
            **kernel: Arguments for the attention layers. In addition a family that attends to images gets
                `attended`; and a family whose `row_size` exceeds D gets `beyond` in steps with images: the
                indices of their rows in the step [rows], ascending, and what they hold beyond D [rows,
                row_size - D].

        Returns:
            Hidden states [T, D].
        """
        if self.fused is not None and kernel.keys() == {"kernel", "tokens"}:
            return self.fused(embeddings, positions.unsqueeze(-2), **kernel)
        out = self.decoder(
            inputs_embeds=embeddings.unsqueeze(0),
            position_ids=positions.unsqueeze(-2),
            use_cache=False,
            **kernel,
        )
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map hidden states [rows, D] to logits [rows, vocabulary]."""
        logits: torch.Tensor = self.head(hidden)
        cap = getattr(self.text_config, "final_logit_softcapping", None)
        return logits if cap is None else (logits / cap).tanh() * cap

    def prefix_salt(self, token_ids: Sequence[int], images: Sequence[ImageInput]) -> bytes:
        """Return what the first token's keys and values depend on, besides that token.

        It becomes part of the hash of all blocks, so prompts share a prefix only where it is equal.
        """
        return b""


@dataclass(frozen=True, slots=True)
class Family:
    """Both halves of a family; a text-only family has no preprocessor.

    Attributes:
        model: The engine's half.
        preprocessor: The front end's half.
        register: Makes the family's config.json known to transformers, if transformers has no class for it.
    """

    model: type[FamilyModel]
    preprocessor: type[Preprocessor[Any]] | None = None
    register: Callable[[], None] | None = None
