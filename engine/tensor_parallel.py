"""Tensor parallelism: each rank keeps a part of every large matrix, and the partial results are summed.

transformers' own `base_model_tp_plan` says how each matrix is cut (Shoeybi et al. 2019, Megatron-LM: columns
of the first matrix of a pair, rows of the second, one sum after it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from engine.errors import ModelLoadError

_FUSED = "colwise_gather_output"
_STYLES = ("colwise", "rowwise", _FUSED, "rowwise_split_input")
"""Ways of cutting a matrix.

The last two are transformers' for projections that are several matrices in one (Phi-3), whose parts it
gathers on all ranks. Here each of these matrices is cut on its own.
"""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The rank of this process, and the number of ranks that share the model."""

    rank: int
    size: int


def read_plan(config: PretrainedConfig, size: int, own: Mapping[str, str] | None = None) -> Mapping[str, str]:
    """Read how the model's matrices are cut.

    Args:
        config: Configuration of the language model.
        size: Number of ranks.
        own: The family's plan, where transformers has none.

    Returns:
        Module name -> way of cutting.

    Raises:
        ModelLoadError: The model has no plan, or its heads or widths are not divisible by the number of ranks.
    """
    plan: Mapping[str, str] = own or getattr(config, "base_model_tp_plan", None) or {}
    if not plan:
        raise ModelLoadError(f"model type {config.model_type!r} has no tensor-parallel plan; set degree 1")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        value = getattr(config, name, None)
        if value is not None and value % size:
            raise ModelLoadError(
                f"tensor_parallel_degree {size} does not divide the model's {name} {value}; choose a divisor"
            )
    return plan


def shard(
    decoder: torch.nn.Module, config: PretrainedConfig, ranks: Ranks, own: Mapping[str, str] | None = None
) -> None:
    """Cut the decoder's matrices down to this rank's part, in place.

    Raises:
        ModelLoadError: As `read_plan`, or a module cannot be cut as the plan says.
    """
    plan = read_plan(config, ranks.size, own)
    for name, module in decoder.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is None or style.startswith(("replicated", "embedding")):
            continue  # every rank keeps the whole of it
        if not isinstance(module, torch.nn.Linear) or style not in _STYLES:
            raise ModelLoadError(f"tensor parallelism of {name!r} ({style}) is not supported; set degree 1")
        if style == _FUSED:
            _cut_fused(decoder.get_submodule(name.rpartition(".")[0]), module, ranks)
        elif style == "colwise":
            _cut(module, ranks, dim=0)
        else:
            _cut(module, ranks, dim=1)
            module.register_forward_hook(_sum_over_ranks)


def _cut(module: torch.nn.Linear, ranks: Ranks, dim: int) -> None:
    """Along the outputs (dim 0) the bias is cut as well; along the inputs (dim 1) only rank 0 adds it."""
    weight = module.weight.data.chunk(ranks.size, dim)[ranks.rank].clone()
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        bias = module.bias.data
        kept = bias.chunk(ranks.size)[ranks.rank].clone() if dim == 0 else bias * (ranks.rank == 0)
        module.bias = torch.nn.Parameter(kept, requires_grad=False)


def _cut_fused(parent: Any, module: torch.nn.Linear, ranks: Ranks) -> None:
    """Cut queries, keys and values in one matrix, or gate and up; an attention layer then has fewer heads."""
    if module is getattr(parent, "qkv_proj", None):
        config = copy(parent.config)
        heads, kv_heads = config.num_attention_heads, parent.num_key_value_heads
        sizes = [count * parent.head_dim for count in (heads, kv_heads, kv_heads)]
        config.num_attention_heads, parent.num_key_value_heads = heads // ranks.size, kv_heads // ranks.size
        parent.config = config
    else:
        sizes = [module.out_features // 2] * 2
    parts = [part.chunk(ranks.size)[ranks.rank] for part in torch.split(module.weight.data, sizes)]
    module.weight = torch.nn.Parameter(torch.cat(parts), requires_grad=False)


def _sum_over_ranks(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(output)
    return output
