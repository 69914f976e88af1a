"""Mistral's params.json as the config.json and the image processor's files of the Hugging Face format.

What each field means is as in vLLM's vllm/transformers_utils/configs/mistral.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open

from handlers.artefacts.error import ArtefactError

_POSITIONS = 128_000
"""Of a model that does not say; vLLM's value."""

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

_MEAN = [0.48145466, 0.4578275, 0.40821073]
_STD = [0.26862954, 0.26130258, 0.27577711]

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "model_type": ("transformer",),
    "activation": ("silu",),
    "use_biases": (),
    "causal": (True,),
    "dtype": tuple(_DTYPES.values()),
}
"""Fields that change nothing with these values, as every field does with null, false or nothing in it."""


class Vision(msgspec.Struct, kw_only=True):
    """`vision_encoder`. max_image_size: longest edge of an image, in pixels, where it is not image_size."""

    hidden_size: int
    num_channels: int = 3
    image_size: int
    patch_size: int
    rope_theta: float = 10000.0
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    adapter_bias: bool = True
    image_token_id: int = 10
    image_break_token_id: int = 12
    image_end_token_id: int = 13
    spatial_merge_size: int = 1
    add_pre_mm_projector_layer_norm: bool = False
    mm_projector_id: str | None = None
    max_image_size: int | None = None


class Params(msgspec.Struct, kw_only=True):
    """A dense decoder, with or without a vision tower."""

    dim: int
    n_layers: int
    head_dim: int | None = None
    hidden_dim: int
    n_heads: int
    n_kv_heads: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float
    vocab_size: int
    tied_embeddings: bool = False
    max_position_embeddings: int | None = None
    max_seq_len: int | None = None
    sliding_window: int | None = None
    vision_encoder: Vision | None = None


def read_params(file: Path) -> Params:
    """Raises ArtefactError naming the field that is missing, wrong or not served."""
    try:
        found = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ArtefactError(f"{file} cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ArtefactError(f"{file} holds no JSON object: it is damaged; fetch it again") from error
    _refuse_unknown(found, Params, "")
    if isinstance(found.get("vision_encoder"), dict):
        _refuse_unknown(found["vision_encoder"], Vision, "vision_encoder.")
    try:
        params = msgspec.convert(found, Params, strict=False)
    except msgspec.ValidationError as error:
        raise ArtefactError(f"params.json of the model: {error}") from error
    _refuse_odd(params)
    return params


def config_of(params: Params, directory: Path) -> dict[str, Any]:
    """config.json."""
    text: dict[str, Any] = {
        "model_type": "mistral",
        "hidden_size": params.dim,
        "num_hidden_layers": params.n_layers,
        "head_dim": params.head_dim or params.dim // params.n_heads,
        "intermediate_size": params.hidden_dim,
        "num_attention_heads": params.n_heads,
        "num_key_value_heads": params.n_kv_heads or params.n_heads,
        "rope_theta": params.rope_theta,
        "rms_norm_eps": params.norm_eps,
        "vocab_size": params.vocab_size,
        "tie_word_embeddings": params.tied_embeddings,
        "max_position_embeddings": params.max_position_embeddings or params.max_seq_len or _POSITIONS,
        "sliding_window": params.sliding_window,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    dtype = _stored_dtype(directory)
    shared: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    vision = params.vision_encoder
    if vision is None:
        return {"architectures": ["MistralForCausalLM"], **text, **shared}
    merges = vision.mm_projector_id == "patch_merge"
    tower = {
        "model_type": "pixtral",
        "hidden_size": vision.hidden_size,
        "num_channels": vision.num_channels,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "rope_theta": vision.rope_theta,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "hidden_act": "silu",
    }
    own: dict[str, Any] = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "vision_feature_select_strategy": "full",
        "image_seq_length": 1,
    }
    if merges:
        own = {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "model_type": "mistral3",
            "spatial_merge_size": vision.spatial_merge_size,
        }
    return {
        **own,
        **shared,
        "text_config": text,
        "vision_config": tower,
        "image_token_index": vision.image_token_id,
        "vision_feature_layer": -1,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": vision.adapter_bias,
        "tie_word_embeddings": params.tied_embeddings,
    }


def processor_files(vision: Vision, longest: int | None) -> dict[str, Any]:
    """preprocessor_config.json and processor_config.json. longest: edge of an image that tekken.json says."""
    edge = longest or vision.max_image_size or vision.image_size
    shared: dict[str, Any] = {"processor_class": "PixtralProcessor", "patch_size": vision.patch_size}
    pixels = {
        "image_processor_type": "PixtralImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"longest_edge": edge},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": _MEAN,
        "image_std": _STD,
    }
    tokens = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    return {
        "preprocessor_config.json": {**shared, **pixels},
        "processor_config.json": {**shared, **tokens, "spatial_merge_size": vision.spatial_merge_size},
    }


def _refuse_unknown(found: Mapping[str, Any], known: type[msgspec.Struct], where: str) -> None:
    names = set(known.__struct_fields__)
    for name, value in found.items():
        if (
            name not in names
            and value not in (None, False, {}, [], "")
            and value not in _NEUTRAL.get(name, ())
        ):
            raise ArtefactError(
                f"params.json of the model has {where}{name} = {msgspec.json.encode(value).decode()[:80]}, which this "
                "server does not read in Mistral's own format: serve the model in the Hugging Face format"
            )


def _refuse_odd(params: Params) -> None:
    vision = params.vision_encoder
    sizes = {
        name: getattr(params, name) for name in ("dim", "n_layers", "hidden_dim", "n_heads", "vocab_size")
    }
    if vision is not None:
        numbers = (
            "hidden_size", "image_size", "patch_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "spatial_merge_size",
        )  # fmt: skip
        sizes |= {f"vision_encoder.{name}": getattr(vision, name) for name in numbers}
    if wrong := next((name for name, value in sizes.items() if value < 1), None):
        raise ArtefactError(f"params.json of the model: {wrong} = {sizes[wrong]}; it must be at least 1")
    if vision is None:
        return
    merges = vision.mm_projector_id == "patch_merge"
    if vision.mm_projector_id not in (None, "", "patch_merge"):
        raise ArtefactError(
            f"params.json of the model has vision_encoder.mm_projector_id = {vision.mm_projector_id!r}, which is not "
            "served; served: patch_merge, or none"
        )
    if merges != vision.add_pre_mm_projector_layer_norm or (not merges and vision.spatial_merge_size != 1):
        raise ArtefactError(
            "params.json of the model: vision_encoder.mm_projector_id, add_pre_mm_projector_layer_norm and "
            "spatial_merge_size fit neither Pixtral (none of them) nor Mistral Small 3.1 (all three): serve the model "
            "in the Hugging Face format"
        )


def _stored_dtype(directory: Path) -> str | None:
    """Of the first tensor of the weights; None where they cannot be read, which is told where they are loaded."""
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    return _DTYPES.get(tensors.get_slice(name).get_dtype())
        except (OSError, SafetensorError):
            return None
    return None
