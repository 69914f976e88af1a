"""Finds the weight files of a model, judges whether they hold all of it, and reads those in Mistral's own format.

Mistral's rotary embedding rotates adjacent numbers of a head together, transformers' the first half with the
second. Therefore the rows of the query and key projections are reordered, in the decoder and in the vision
tower. Names and layout are those of transformers' own conversion script (convert_pixtral_weights_to_hf.py),
and of its Mistral 3 counterpart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import FaultyModel, ModelLoadError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_SAFE = ("model.safetensors", "model.safetensors.index.json")
_MISTRAL = ("consolidated.safetensors", "consolidated.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")

PREFIX = "consolidated"

JUDGED: Mapping[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Arguments with which transformers' `from_pretrained` returns what `complete` judges."""

POOLING, LAST_NORM = "vision_tower.head.", "vision_tower.post_layernorm."
"""SigLIP's pooling, which no family uses, and the norm after a tower's last layer, which some do not: checkpoints may
leave out what is not used, and not every config.json says so."""

_MOST_NAMED = 3
"""The most tensors that a message names."""

_DECODER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOWER = {
    "attention.wq": "attention.q_proj",
    "attention.wk": "attention.k_proj",
    "attention.wv": "attention.v_proj",
    "attention.wo": "attention.o_proj",
    "feed_forward.w1": "feed_forward.gate_proj",
    "feed_forward.w2": "feed_forward.down_proj",
    "feed_forward.w3": "feed_forward.up_proj",
    "attention_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}
_ENDS = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BESIDE = {
    "vision_encoder.patch_conv.weight": "vision_tower.patch_conv.weight",
    "vision_encoder.ln_pre.weight": "vision_tower.ln_pre.weight",
    "vision_language_adapter.w_in.": "multi_modal_projector.linear_1.",
    "vision_language_adapter.w_out.": "multi_modal_projector.linear_2.",
    "pre_mm_projector_norm.weight": "multi_modal_projector.norm.weight",
    "patch_merger.merging_layer.weight": "multi_modal_projector.patch_merger.merging_layer.weight",
}
_LAYER = re.compile(r"(vision_encoder\.transformer\.)?layers\.(\d+)\.(.+)\.weight")

MISTRAL_CLASSES = {
    "mistral": "MistralForCausalLM",
    "llava/pixtral": "LlavaForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
}
"""Kind of a model whose weights can be read from Mistral's format -> transformers' class."""


def weight_files(folder: Path, *, pickled: bool = False, named: str | None = None) -> list[Path]:
    """List the weight files of a model, as one file or as an index names them.

    Files in Mistral's own format are used if there are no other safetensors files.

    Args:
        folder: Directory of the model.
        pickled: Whether PyTorch's own files, which are pickles, may be used if there are no safetensors files.
        named: File or index named by config.json (`transformers_weights`).

    Returns:
        Paths of existing files.

    Raises:
        ModelLoadError: Files are missing or not allowed; the message says which.
    """
    names = (named,) if named else (*_SAFE, *_MISTRAL, *_PICKLED)
    found = next((name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise ModelLoadError(
            f"the model's directory holds no weights: there is neither {' nor '.join(names)}; give a complete one"
        )
    files = _shards(folder / found) if found.endswith(".json") else [found]
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ModelLoadError(f"{found} names {missing[0]}, which is missing: give a complete directory")
    if not pickled and (unsafe := [file for file in files if not file.endswith(".safetensors")]):
        raise ModelLoadError(
            f"the model's weights are not in safetensors but in {unsafe[0]}, which is a pickle: convert them "
            "(transformers' save_pretrained writes safetensors), or set option.load_format=pt, which reads them "
            "without running what is in them"
        )
    return [folder / file for file in files]


def complete(loaded: tuple[PreTrainedModel, Mapping[str, Any]], unused: Sequence[str]) -> PreTrainedModel:
    """Return a model that was loaded with `JUDGED`, if its files held all of it but what is `unused` (parts of names).

    transformers initialises at random what is missing or has another shape, and only logs it. Buffers may be missing,
    since they are computed.

    Raises:
        FaultyModel: Names the tensors that are missing, or one of another shape.
    """
    model, info = loaded
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        name, stored, expected = wrong[0]
        raise FaultyModel(
            f"the model's weights do not fit its config.json: {name} is {list(stored)} in the files and should be "
            f"{list(expected)}{_and_more(len(wrong) - 1)}: fetch both from one place"
        )
    needed = {name for name, _ in model.named_parameters() if not any(part in name for part in unused)}
    missing = sorted(set(info["missing_keys"]) & needed)
    if missing:
        raise FaultyModel(
            f"the model's files lack {', '.join(missing[:_MOST_NAMED])}{_and_more(len(missing) - _MOST_NAMED)} "
            "(transformers' names): fetch the model again, or convert it with all of its weights"
        )
    return model


def _and_more(count: int) -> str:
    return f", and {count} more" if count > 0 else ""


def _shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return sorted(str(name) for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index.name} of the model cannot be read: it holds no weight_map") from error


def are_mistrals(files: Sequence[Path]) -> bool:
    """Tell whether a model's weight files are in Mistral's own format."""
    return bool(files) and all(file.name.startswith(PREFIX) for file in files)


def mistral_state_dict(files: Sequence[Path], config: PretrainedConfig) -> dict[str, Any]:
    """Build a `state_dict` for transformers' `from_pretrained`; each tensor is read when it is accessed.

    Raises:
        FaultyModel: Names a tensor that does not belong to such a model.
    """
    from safetensors import safe_open

    text = config.get_text_config()
    heads = {"q": text.num_attention_heads, "k": text.num_key_value_heads}
    vision = getattr(config, "vision_config", None)
    found: dict[str, Any] = {}
    for file in files:
        tensors: Any = safe_open(file, "pt")
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            target = _renamed(name, in_llava=vision is not None)
            if target is None:
                raise FaultyModel(
                    f"{file.name} holds {name!r}, which is not a tensor of such a model in Mistral's format: serve the "
                    "model in the Hugging Face format"
                )
            stored: Any = tensors.get_slice(name)
            if rotated := re.search(r"attn\.([qk])_proj\.weight$", target):
                stored = _Reordered(stored, heads[rotated[1]])
            elif vision is not None and re.search(r"attention\.[qk]_proj\.weight$", target):
                stored = _Reordered(stored, vision.num_attention_heads)
            found[target] = stored
    return found


def _renamed(name: str, *, in_llava: bool) -> str | None:
    """Return transformers' name of a tensor; None if it has none."""
    decoder = "language_model." if in_llava else ""
    if name in _ENDS:
        return decoder + _ENDS[name]
    if (layer := _LAYER.fullmatch(name)) is not None:
        tower, number, part = layer.groups()
        table = _TOWER if tower else _DECODER
        if part not in table or (tower and not in_llava):
            return None
        place = "vision_tower.transformer" if tower else f"{decoder}model"
        return f"{place}.layers.{number}.{table[part]}.weight"
    for prefix, ours in _BESIDE.items():
        if in_llava and name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return None


class _Reordered:
    """A slice of a safetensors file for query or key weights [heads x head_dim, D], reordered when it is read."""

    def __init__(self, stored: Any, heads: int) -> None:
        self._stored = stored
        self._heads = heads

    def get_dtype(self) -> str:
        return str(self._stored.get_dtype())

    def get_shape(self) -> list[int]:
        return list(self._stored.get_shape())

    def __getitem__(self, index: Any) -> torch.Tensor:
        weight: torch.Tensor = self._stored[...]
        rows, columns = weight.shape
        pairs = weight.view(self._heads, rows // self._heads // 2, 2, columns)
        reordered: torch.Tensor = pairs.transpose(1, 2).reshape(rows, columns)[index]
        return reordered
