"""A family's half for the engine, and both halves together; see `engine.families.preprocessor` for the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from engine.errors import ModelLoadError
from engine.families.preprocessor import Preprocessor
from engine.weights import JUDGED, POOLING, complete

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from engine.commands import ImagePlace
    from engine.fused import FusedDecoder
    from engine.messages import ImageInput
    from engine.tensor_parallel import Ranks


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


TEXT_TYPES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""Decoders that are tested to give the tokens of transformers' own `generate`."""

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

    By default a model's images become rows of the decoder's input.

    Attributes:
        decoder: The language model without its head; it maps `inputs_embeds` to `last_hidden_state`.
        text_config: The decoder's configuration.
        auto_class: transformers' class that loads the weights.
        decoder_types: Types of decoder that are served; None where the family has one of its own.
        position_axes: Number of axes of positions that the rotary embedding uses.
        attends_images: Whether the decoder's tokens attend to images, whose encoder outputs are then needed in every
            step of a request. Otherwise the outputs replace embeddings.
        spans_pass_windows: Whether a sliding window hides nothing within a span (see `spans`).
        encode_batch: Greatest number of images encoded in one call, which bounds the memory of the tower's activations.
        tensor_parallel_plan: How ranks share the decoder (see `engine.tensor_parallel`), where transformers does not
            define it.
    """

    auto_class: ClassVar[str] = "AutoModelForImageTextToText"
    decoder_types: ClassVar[Sequence[str] | None] = TEXT_TYPES
    position_axes: ClassVar[int] = 1
    attends_images: ClassVar[bool] = False
    spans_pass_windows: ClassVar[bool] = False
    encode_batch: ClassVar[int] = 16
    tensor_parallel_plan: ClassVar[Mapping[str, str] | None] = None

    def __init__(self, model: PreTrainedModel) -> None:
        from engine.long_rope import LongRope

        self.model = model
        self.decoder: torch.nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
        self.text_config: PretrainedConfig = model.config.get_text_config()
        self.long_rope = LongRope.of(self.decoder)
        self.fused: FusedDecoder | None = None

    @classmethod
    def check(cls, config: PretrainedConfig) -> None:
        """Check that this model of the family can be served.

        Raises:
            ModelLoadError: It cannot.
        """
        kind = config.get_text_config().model_type
        if cls.decoder_types is not None and kind not in cls.decoder_types:
            raise ModelLoadError(
                f"its decoder is of type {kind!r}, which the embedded engine does not serve; it serves "
                f"{', '.join(cls.decoder_types)}"
            )

    @classmethod
    def unused_weights(cls, config: PretrainedConfig) -> Sequence[str]:
        """Return parts of the names of weights that the model does not use, so that its files may lack them."""
        return (POOLING,)

    @classmethod
    def load(cls, model_path: str, config: PretrainedConfig, **options: Any) -> FamilyModel:
        """Load the weights; `options` are passed to transformers' `from_pretrained`."""
        import transformers

        loader = getattr(transformers, cls.auto_class)
        options["attn_implementation"] = cls.attention(config)
        return cls(complete(loader.from_pretrained(model_path, **options, **JUDGED), cls.unused_weights(config)))

    @classmethod
    def attention(cls, config: PretrainedConfig) -> dict[str, str]:
        """Choose our attention for the decoder, and PyTorch's for the vision tower."""
        from engine.attention.bridge import IMPLEMENTATION

        decoder = "text_config" if "text_config" in config.sub_configs else ""
        return dict.fromkeys(config.sub_configs, "sdpa") | {decoder: IMPLEMENTATION}

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
            One `EncoderOutput` per image: rows [rows, row_size], unless the family's own `forward` uses another form.
        """
        import torch

        pixels = torch.stack([image["pixel_values"] for image in images]).to(self.model.dtype)
        return list(self.features(pixel_values=pixels))

    def features(self, **inputs: Any) -> Any:
        """Return the projected rows of images by transformers' own method."""
        return self.model.model.get_image_features(**inputs, return_dict=True).pooler_output

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor, **kernel: Any) -> torch.Tensor:
        """Run the decoder.

        Args:
            embeddings: [T, D].
            positions: [T], or [position_axes, T] if there are several axes.
            **kernel: Arguments for the attention layers. In addition a family that attends to images gets `attended`;
                and a family whose `row_size` exceeds D gets `beyond` in steps with images: the indices of their rows in
                the step [rows], ascending, and what they hold beyond D [rows, row_size - D].

        Returns:
            Hidden states [T, D].
        """
        out = self.decoder(
            inputs_embeds=embeddings.unsqueeze(0), position_ids=positions.unsqueeze(-2), use_cache=False, **kernel
        )
        hidden: torch.Tensor = out.last_hidden_state[0]
        return hidden

    def last_hidden(
        self, embeddings: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, **kernel: Any
    ) -> torch.Tensor:
        """Run the decoder, and return hidden states [len(rows), D] of those rows alone.

        The other arguments are those of `forward`, which runs if the decoder is not fused or the step needs more.
        """
        if self.fused is not None and kernel.keys() == {"kernel", "tokens"}:
            return self.fused(embeddings, positions.unsqueeze(-2), rows, **kernel)
        return self.forward(embeddings, positions, **kernel)[rows]

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
