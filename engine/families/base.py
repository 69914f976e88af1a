"""A model family in two halves: `Preprocessor` for the front, `FamilyModel` for the engine.

The front's half turns an image into arrays and prompt tokens, without weights. transformers' own processors import
torch and half of transformers, several hundred megabytes, so what a preprocessor learns from them is plain data
(`Facts`), and another process goes on with that alone. A family's file therefore imports neither torch nor
transformers at its top.
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
from engine.families.pixels import ProcessorBackend, Recipe, processor_options

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from engine.messages import Picture
    from engine.scheduler import PicturePlace
    from engine.tensor_parallel import Ranks

Arrays = dict[str, npt.NDArray[np.generic]]

GRID = "image_grid_thw"
"""The name under which an image brings its frames, and the rows and columns of its patches."""

_PROBES = ((40, 64), (129, 77), (301, 300))
"""Sizes (width, height) of the images that the two ways are compared on: upscaled, odd, downscaled."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What stands in the prompt for an image instead of its one image token.

    is_embed: which of the tokens take an encoder row, in order; None means all.
    """

    token_ids: list[int]
    is_embed: list[bool] | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """placeholder: the text that stands for an image when the prompt is tokenised, image token and all around it.
    printed: what the chat template prints instead, to be replaced by it; None where it prints the placeholder.
    texts_apart: the texts around images are tokenised apart, each as a prompt of its own. The placeholder is then the
    image token alone.
    """

    placeholder: str
    printed: str | None = None
    texts_apart: bool = False


@dataclass(frozen=True, slots=True)
class PreparedPicture:
    """An image as its model wants it: its layout, and the arguments of the family's `encode`."""

    token_ids: list[int]
    tensors: Arrays
    is_embed: list[bool] | None = None


@dataclass(frozen=True)
class ModelFiles:
    """What a family may ask of a model's directory, read by transformers.

    processor: the image processor. backend: whose arithmetic it is to have, "torchvision" or "pil".
    """

    path: str
    config: PretrainedConfig
    processor: Any
    backend: str

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        # Where mistral_common is installed, transformers would take Mistral's own tokenizer, which is no fast one.
        return AutoTokenizer.from_pretrained(self.path, mistral_format=False)


class Facts(msgspec.Struct, kw_only=True):
    """All that a preprocessor needs, as plain data. Families add fields.

    image_token_id: the one token that stands for an image in a rendered prompt.
    recipe: how pixels are made without transformers; None where its own processor has to do it.
    fingerprint: changes whenever the same image would be prepared differently; enters the image's digest.
    """

    image_token_id: int
    recipe: Recipe | None
    fingerprint: bytes = b""


F = TypeVar("F", bound=Facts)


class Preprocessor(ABC, Generic[F]):
    """Turns upright RGB images into arrays. `prepare` is called from several threads at once.

    What happens to an image may depend on the rest of the prompt: `variant` numbers the ways, of which there are
    `num_variants`.

    facts_type: the family's `Facts`. tensor_names: the arrays of `transformers`' processor that the engine wants.
    chat_template: the one of the model's card, for families whose checkpoints have none.
    adds_special_tokens: the tokenizer adds its own to a prompt that does not begin with one, as in most processors.
    max_images: how many a prompt can hold; None where only its length limits them.
    takes_embeddings: clients may send rows in place of an image, each of which becomes one image token.
    """

    facts_type: ClassVar[type[Facts]]
    tensor_names: ClassVar[tuple[str, ...]] = ("pixel_values",)
    chat_template: ClassVar[str | None] = None
    takes_embeddings: ClassVar[bool] = True
    adds_special_tokens: ClassVar[bool] = True
    max_images: ClassVar[int | None] = None
    probes: ClassVar[tuple[tuple[int, int], ...]] = _PROBES
    num_variants: ClassVar[int] = 1

    def __init__(self, facts: F, processor: Any = None) -> None:
        """processor: transformers', needed where `facts.recipe` is None."""
        self.facts = facts
        self._processor = processor

    @classmethod
    def from_model(
        cls, model_path: str, overrides: dict[str, Any] | None = None, backend: ProcessorBackend = "auto"
    ) -> Preprocessor[F]:
        """Slow: asks transformers. overrides: of the image processor's own settings.

        The direct way to the pixels is compared with transformers' on a few images and used where both are equal.
        Raises ModelLoadError where the processor cannot work with this backend.
        """
        from transformers import AutoConfig, AutoImageProcessor

        config = AutoConfig.from_pretrained(model_path)
        load: Any = AutoImageProcessor.from_pretrained
        processor = load(model_path, **{**processor_options(backend), **(overrides or {})})
        native = getattr(processor, "backend", "pil")
        wanted = native if backend == "auto" else backend
        facts = cls.read(ModelFiles(model_path, config, processor, wanted))
        made = cls(facts, processor)
        if wanted != native:
            if facts.recipe is None:
                raise ModelLoadError(
                    "the model's image processor needs torchvision itself; install torchvision"
                )
        elif facts.recipe is not None and not made._direct_is_exact():
            facts.recipe = None
        settings = json.dumps([wanted, processor.to_dict()], sort_keys=True, default=str).encode()
        known = settings + msgspec.msgpack.encode(facts)
        facts.fingerprint = hashlib.blake2b(known, digest_size=8).digest()
        return made

    @classmethod
    @abstractmethod
    def read(cls, model: ModelFiles) -> F:
        """What the family wants to know of a model. Raises ModelLoadError for one that it cannot serve."""

    @classmethod
    def from_bytes(cls, facts: bytes) -> Preprocessor[F]:
        return cls(msgspec.msgpack.decode(facts, type=cls.facts_type))  # type: ignore[arg-type]

    def to_bytes(self) -> bytes | None:
        """For `from_bytes` in another process; None where that would need transformers' processor."""
        return None if self.facts.recipe is None else msgspec.msgpack.encode(self.facts)

    @property
    def image_token_id(self) -> int:
        return self.facts.image_token_id

    @property
    def forbidden_token_ids(self) -> Sequence[int]:
        """Tokens that no answer may hold, whatever its grammar allows."""
        return [self.facts.image_token_id]

    @property
    def fingerprint(self) -> bytes:
        return self.facts.fingerprint

    @property
    def grid_merge(self) -> int | None:
        """Patches along each side of the square that becomes one token, where `positions` asks for an image's grid of
        patches (its tensor `GRID`); None where it does not."""
        return None

    @abstractmethod
    def layout(self, width: int, height: int, variant: int = 0) -> Layout:
        """What an image of that size becomes in the prompt. Raises RequestRejected for one that cannot be prepared."""

    def around(self, num_images: int) -> tuple[list[int], list[int]]:
        """Tokens before and after those of a prompt's text, for families whose images do not stand in the text: nothing
        is then written for them there, and the tokenizer adds nothing by itself. The first one is the image token."""
        return [], []

    def arranged(self, text: str, bos: str) -> str:
        """A prompt that is not a chat, with its placeholders, as the family's processor completes it."""
        return text

    def written(self, tokenizer: PreTrainedTokenizerFast) -> Written | None:
        """How an image is written in a rendered prompt, where that is more than the image token."""
        return None

    @abstractmethod
    def direct(self, image: Image, variant: int = 0) -> Arrays:
        """The arrays by `facts.recipe`."""

    def reference(self, image: Image, variant: int = 0) -> Arrays:
        """The same arrays by transformers' image processor."""
        out = self._processor(images=image, return_tensors="np")
        return {name: np.asarray(out[name][0]) for name in self.tensor_names}

    def variant(self, num_images: int) -> int:
        """The way in which the images of a prompt with that many are prepared."""
        return 0

    def prepare(self, image: Image, variant: int = 0) -> PreparedPicture:
        layout = self.layout(image.width, image.height, variant)
        tensors = (self.reference if self.facts.recipe is None else self.direct)(image, variant)
        return PreparedPicture(layout.token_ids, tensors, layout.is_embed)

    def positions(
        self, num_tokens: int, pictures: Sequence[Picture]
    ) -> tuple[npt.NDArray[np.int64] | None, int]:
        """The positions of a prompt's tokens [axes, num_tokens], None for 0, 1, 2, … on every axis; and what is added
        to the index of a token behind the prompt (without an array: of any token)."""
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


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """What the key/value cache holds for a token: num_layers x 2 x kv_heads x head_dim values.

    image_values: how many values are kept for each image of a running request, beside its tokens.
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
"""A `FamilyModel.tensor_parallel_plan` for decoders with Llama's names, for which transformers has no plan."""


@dataclass(frozen=True, slots=True)
class AttendedChunk:
    """The tokens [start, stop) of a sequence with images, in the step's rows from `row` on; and all its images, in
    order, with their encoder outputs."""

    row: int
    start: int
    stop: int
    pictures: Sequence[PicturePlace]
    features: Sequence[Any]


class FamilyModel:
    """A loaded model. Shapes: T is the number of packed tokens of a step, D the text hidden size.

    The defaults are those of a model with a `language_model` inside whose images become rows of its input.

    auto_class: transformers' class that loads the weights. position_axes: 1, or as many as the rotary embedding takes.
    attends_images: the decoder's tokens attend to images, whose encoder outputs must be there in every step of a
        request; otherwise the outputs replace embeddings.
    spans_pass_windows: a sliding window hides nothing within a span (see `spans`).
    encode_batch: images encoded in one call at most, which bounds the memory that the tower's activations take.
    tensor_parallel_plan: how ranks share the decoder (see `engine.tensor_parallel`), where transformers does not say.
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

    @classmethod
    def check(cls, config: PretrainedConfig) -> None:
        """Raise ModelLoadError for a model of this family that is not served."""

    @classmethod
    def load(cls, model_path: str, config: PretrainedConfig, **options: Any) -> FamilyModel:
        """options: of transformers' `from_pretrained`."""
        import transformers

        loader = getattr(transformers, cls.auto_class)
        options["attn_implementation"] = cls.attention(config)
        return cls(loader.from_pretrained(model_path, **options))

    @classmethod
    def attention(cls, config: PretrainedConfig) -> str | dict[str, str]:
        """Our attention for the decoder, PyTorch's for the vision tower."""
        from engine.attention.bridge import IMPLEMENTATION

        if "text_config" not in config.sub_configs:
            return IMPLEMENTATION
        return {name: IMPLEMENTATION if name == "text_config" else "sdpa" for name in config.sub_configs}

    @classmethod
    def check_ranks(cls, config: PretrainedConfig, size: int) -> None:
        """Raise ModelLoadError where that many ranks cannot share the model."""
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
    def special_attention(self) -> bool:
        """The kernel has to know spans, or caps of attention scores."""
        return bool(getattr(self.text_config, "attn_logit_softcapping", None))

    def spans(self, token_ids: Sequence[int], pictures: Sequence[Picture]) -> list[tuple[int, int]]:
        """Runs [start, stop) of a prompt whose tokens see each other both ways. They are computed in one step."""
        return []

    @property
    def decoder(self) -> torch.nn.Module:
        """The language model without its head: takes `inputs_embeds`, gives `last_hidden_state`."""
        decoder: torch.nn.Module = self.model.model.language_model
        return decoder

    @property
    def head(self) -> torch.nn.Module:
        head: torch.nn.Module = self.model.lm_head
        return head

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, D]; a placeholder's row is overwritten afterwards, so any row will do for it."""
        table = self.decoder.get_input_embeddings()  # type: ignore[operator]
        embedded: torch.Tensor = table(token_ids.clamp(max=table.num_embeddings - 1))
        return embedded

    @property
    def row_size(self) -> int:
        """Numbers in each row of `encode`: D, or more where `forward` takes what is beyond D."""
        return int(self.text_config.hidden_size)

    def encode(self, pictures: Sequence[dict[str, torch.Tensor]]) -> list[Any]:
        """One `EncoderOutput` per image, of the tensors of its `PreparedPicture`: rows [rows, row_size], unless the
        family's own `forward` uses them. Text-only families are never asked."""
        import torch

        pixels = torch.stack([picture["pixel_values"] for picture in pictures]).to(self.model.dtype)
        return list(self.model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor, **kernel: Any) -> torch.Tensor:
        """[T, D] and positions [T], or [position_axes, T] where there are several, through the decoder -> [T, D].

        kernel: to be handed down to the attention layers, but for `attended`, which only a family that attends images
        is given; and `beyond`, for a family with a larger `row_size` than D in steps that show images: where their rows
        stand in the step [rows], ascending, and what they hold beyond D [rows, row_size - D].
        """
        out = self.decoder(
            inputs_embeds=embeddings.unsqueeze(0),
            position_ids=positions.unsqueeze(-2),
            use_cache=False,
            **kernel,
        )
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, D] -> [rows, vocabulary]."""
        logits: torch.Tensor = self.head(hidden)
        cap = getattr(self.text_config, "final_logit_softcapping", None)
        return logits if cap is None else (logits / cap).tanh() * cap

    def prefix_salt(self, token_ids: Sequence[int], pictures: Sequence[Picture]) -> bytes:
        """What the keys and values of a prompt's first token depend on, besides that token: enters the hash of all its
        blocks, so that prompts share a prefix only where this is equal."""
        return b""


@dataclass(frozen=True, slots=True)
class Family:
    """Both halves; a text-only family has no preprocessor.

    register: makes its config.json known to transformers, where that has no class for it.
    """

    model: type[FamilyModel]
    preprocessor: type[Preprocessor[Any]] | None = None
    register: Callable[[], None] | None = None
