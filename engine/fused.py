"""Decoders on a CPU in fewer and larger operations than transformers' modules take, with the same results.

Linear layers of the same input become one matrix (`stack`), in all decoders with the usual names. Decoders of Llama's
kind are run without transformers' modules (`FusedDecoder`), whose many small operations take a fifth of a decode step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from engine.attention.kernel import AttentionKernel

_STACKS = {
    "self_attn": ("q_proj", "k_proj", "v_proj"),
    "mlp": ("gate_proj", "up_proj"),
    "feed_forward": ("gate_proj", "up_proj"),
}
"""Name of a module -> its linear layers with the same input."""

_DECODERS = (
    "LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "Qwen2VLTextModel", "Qwen2_5_VLTextModel",
    "Qwen3VLTextModel",
)  # fmt: skip
"""transformers' classes that `FusedDecoder` can run."""


class _Stack(torch.nn.Module):
    """Several linear layers of the same input as one."""

    def __init__(self, layers: list[torch.nn.Linear]) -> None:
        super().__init__()
        self.sizes = [len(layer.weight) for layer in layers]
        first = layers[0]
        self.linear = torch.nn.Linear(first.in_features, sum(self.sizes), first.bias is not None, device="meta")
        for name in ("weight", "bias") if first.bias is not None else ("weight",):
            parts = [getattr(layer, name).detach() for layer in layers]
            setattr(self.linear, name, torch.nn.Parameter(torch.cat(parts), requires_grad=False))
        self._rows: torch.Tensor | None = None
        self._parts: tuple[torch.Tensor, ...] = ()

    def part(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        """Return what layer `number` makes of the rows; the product is kept until its last part is taken."""
        if self._rows is not rows:
            self._rows, self._parts = rows, self.linear(rows).split(self.sizes, -1)
        part = self._parts[number]
        if number == len(self.sizes) - 1:
            self._rows, self._parts = None, ()
        return part


class StackedLinear(torch.nn.Module):
    """A linear layer that is a part of a `_Stack`, in the place of the original."""

    def __init__(self, stack: _Stack, number: int) -> None:
        super().__init__()
        self.stack = stack
        self._number = number

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [..., in_features] to [..., out_features]."""
        return self.stack.part(self._number, rows)


def stack(model: torch.nn.Module) -> None:
    """Make one matrix of each layer's query, key and value projections, and one of gate and up.

    Tensor-parallel ranks do so with their own parts; a layer with a hook stays as it is.
    """
    for name, module in list(model.named_modules()):
        parts = _STACKS.get(name.rpartition(".")[2], ())
        layers = [getattr(module, part, None) for part in parts]
        if layers and all(_stackable(layer, layers[0]) for layer in layers):
            stacked = _Stack(layers)  # type: ignore[arg-type]
            for number, part in enumerate(parts):
                setattr(module, part, StackedLinear(stacked, number))


def _stackable(layer: Any, first: Any) -> bool:
    return (
        type(layer) is type(first) is torch.nn.Linear
        and not layer._forward_hooks
        and layer.in_features == first.in_features
        and (layer.bias is None) == (first.bias is None)
    )


class FusedDecoder:
    """Runs a stacked decoder: its embeddings in, its last hidden states out."""

    def __init__(self, decoder: Any) -> None:
        self._rotary = decoder.rotary_emb
        self._norm = decoder.norm
        self._layers = [_Layer(layer) for layer in decoder.layers]

    @classmethod
    def of(cls, decoder: Any) -> FusedDecoder | None:
        """Return one for the decoder; None if it is of another kind, or not stacked."""
        if type(decoder).__name__ not in _DECODERS:
            return None
        stacked = all(
            isinstance(layer.self_attn.q_proj, StackedLinear) and isinstance(layer.mlp.up_proj, StackedLinear)
            for layer in decoder.layers
        )
        return cls(decoder) if stacked else None

    def __call__(
        self,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        *,
        kernel: AttentionKernel,
        tokens: int,
    ) -> torch.Tensor:
        """Run the layers. Of the last one, only what the wanted rows need is computed after its attention.

        Args:
            embeddings: [T, D].
            positions: [1, T], or [axes, 1, T].
            rows: Indices of the wanted rows.
            kernel: Computes the attention.
            tokens: Number of real tokens; the others are padding.

        Returns:
            Hidden states [len(rows), D].
        """
        cos, sin = (table[0].unsqueeze(1) for table in self._rotary(embeddings[None], positions))
        low, high = sin.chunk(2, -1)
        sin = torch.cat((-low, high), -1)
        hidden = embeddings
        *others, last = self._layers
        for layer in others:
            hidden = layer.forward(hidden, layer.attend(hidden, cos, sin, kernel, tokens))
        attended = last.attend(hidden, cos, sin, kernel, tokens)
        return _normalised(last.forward(hidden[rows], attended[rows]), self._norm)


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._number: int = attention.layer_idx
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self._head_norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._qkv, self._output = attention.q_proj.stack.linear, attention.o_proj
        self._gate_up, self._act, self._down = mlp.gate_proj.stack.linear, mlp.act_fn, mlp.down_proj
        queries, keys, _ = attention.q_proj.stack.sizes
        self._head_dim: int = attention.head_dim
        self._queries, self._keys = queries // self._head_dim, keys // self._head_dim
        self._scale: float = attention.scaling
        own = attention.config if "Mistral" in type(attention).__name__ else attention
        self._window: int | None = getattr(own, "sliding_window", None)

    def attend(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernel: AttentionKernel, tokens: int
    ) -> torch.Tensor:
        """Return the attention's result for the layer's input [T, D], before its output projection: [T, heads * dim].

        cos, sin: [T, 1, head_dim]; the first half of the sines is negated.
        """
        rows = len(hidden)
        heads = self._qkv(_normalised(hidden, self._norms[0])).view(rows, -1, self._head_dim)
        turned, value = heads[:, : -self._keys], heads[:tokens, -self._keys :]
        if self._head_norms[0] is not None:
            parts = turned.split((self._queries, self._keys), 1)
            turned = torch.cat([_normalised(*pair) for pair in zip(parts, self._head_norms, strict=True)], 1)
        turned = torch.addcmul(turned * cos, turned.roll(self._head_dim // 2, -1), sin)
        attended = kernel.attend(
            self._number,
            turned[:tokens, : self._queries],
            turned[:tokens, self._queries :],
            value,
            scale=self._scale,
            window=self._window,
        )
        if tokens < rows:
            attended = F.pad(attended, (0, 0, 0, 0, 0, rows - tokens))
        return attended.reshape(rows, -1)

    def forward(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Map the layer's input [T, D] and what `attend` returned for it to its output [T, D]."""
        hidden = self._output(attended).add_(hidden)
        gate, up = self._gate_up(_normalised(hidden, self._norms[1])).chunk(2, -1)
        forwarded: torch.Tensor = self._down(self._act(gate).mul_(up))
        return forwarded.add_(hidden)


def _normalised(rows: torch.Tensor, norm: Any) -> torch.Tensor:
    return F.rms_norm(rows, norm.weight.shape, norm.weight, norm.variance_epsilon)
