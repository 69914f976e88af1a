"""Models in Mistral's own format, as Pixtral-12B-2409 is published: `params.json`, `tekken.json`, `consolidated*`.

The files of the Hugging Face format that such a model lacks are written into a directory that also links to all the
files that it has; everything else in this server reads that directory. The weights are not copied: the embedded engine
converts them while it loads them (`engine.weights`), and vLLM reads them itself. The fields of `params.json` mean what
they mean in vLLM's vllm/transformers_utils/configs/mistral.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from safetensors import SafetensorError, safe_open

from handlers.artefacts import ArtefactError
from handlers.artefacts.tekken import TEKKEN, chat_template, read_tekken, tokenizer_files

logger = logging.getLogger(__name__)

PARAMS = "params.json"

_FORMAT = b"2"
"""Version of what is written here. Directories that another version wrote are not used."""

_DEFAULT_POSITIONS = 128_000  # as in vLLM

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

_IGNORED: Mapping[str, tuple[object, ...]] = {
    "model_type": ("transformer",),
    "activation": ("silu",),
    "causal": (True,),
    "dtype": tuple(_DTYPES.values()),
}
"""Values that are accepted of fields that are not read here, because they change nothing. So are null, false and empty
values of any field."""

_Size = Annotated[int, msgspec.Meta(ge=1)]


class Vision(msgspec.Struct, kw_only=True):
    """`vision_encoder`. max_image_size: the longest edge of an image in pixels; if null, `image_size` is."""

    hidden_size: _Size
    num_channels: int = 3
    image_size: _Size
    patch_size: _Size
    rope_theta: float = 10000.0
    intermediate_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    adapter_bias: bool = True
    image_token_id: int = 10
    image_break_token_id: int = 12
    image_end_token_id: int = 13
    spatial_merge_size: _Size = 1
    add_pre_mm_projector_layer_norm: bool = False
    mm_projector_id: str | None = None
    max_image_size: int | None = None


class Params(msgspec.Struct, kw_only=True):
    """params.json: a dense decoder, with or without a vision tower."""

    dim: _Size
    n_layers: _Size
    head_dim: int | None = None
    hidden_dim: _Size
    n_heads: _Size
    n_kv_heads: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float
    vocab_size: _Size
    tied_embeddings: bool = False
    max_position_embeddings: int | None = None
    max_seq_len: int | None = None
    sliding_window: int | None = None
    vision_encoder: Vision | None = None


def lacks_hub_files(directory: Path) -> bool:
    """Whether a model has to be completed before it can be served."""
    return _lacks(directory, PARAMS, "config.json") or _lacks(directory, TEKKEN, "tokenizer.json")


def completed(directory: Path, root: Path) -> Path:
    """Return a directory below `root` with all files of the model, and those of the Hugging Face format that it lacks.

    The directory that an earlier start made is used if the model has not changed since. Raises ArtefactError for a
    model that cannot be served, naming the field of params.json or tekken.json that is why.
    """
    place = root / "mistral" / _key(directory)
    if place.is_dir():
        return place
    made = _files(directory)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=place.parent))
        try:
            for entry in directory.iterdir():
                if entry != place.parent:
                    (draft / entry.name).symlink_to(entry.resolve())
            for name, text in made.items():
                if not (draft / name).exists():
                    (draft / name).write_text(text, encoding="utf-8")
            draft.chmod(0o755)  # Another user's server may share `root`, and must be able to read it.
            draft.rename(place)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)
            if not place.is_dir():  # If it is, another process was faster.
                raise
    except OSError as error:
        raise ArtefactError(
            f"the files that {directory} lacks of the Hugging Face format cannot be kept in {root}: "
            f"{error.strerror}; set SERVING_DOWNLOAD_DIR"
        ) from error
    logger.info("the model is in Mistral's own format; %s has what it lacks of the Hugging Face one", place)
    return place


def _lacks(directory: Path, theirs: str, ours: str) -> bool:
    return (directory / theirs).is_file() and not (directory / ours).is_file()


def _key(directory: Path) -> str:
    """Return a name that changes when the model's files do."""
    digest = hashlib.sha256(_FORMAT + os.fsencode(directory.resolve()))
    try:
        for entry in sorted(entry for entry in directory.iterdir() if entry.is_file()):
            stat = entry.stat()
            digest.update(repr((entry.name, stat.st_size, stat.st_mtime_ns)).encode())
    except OSError as error:
        raise ArtefactError(f"{directory} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:24]


def _files(directory: Path) -> dict[str, str]:
    """Return the text of each file to add, by its name."""
    files: dict[str, Any] = {}
    template: str | None = None
    tekken = read_tekken(directory / TEKKEN) if (directory / TEKKEN).is_file() else None
    if _lacks(directory, PARAMS, "config.json"):
        params = _read_params(directory / PARAMS)
        files["config.json"] = _config(params, directory)
        if params.vision_encoder is not None:
            files |= _processor_files(params.vision_encoder, None if tekken is None else tekken.longest)
    if tekken is not None and _lacks(directory, TEKKEN, "tokenizer.json"):
        files |= tokenizer_files(tekken)
        if not any((directory / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
            template = chat_template(tekken)
    made = {name: json.dumps(content, ensure_ascii=False) for name, content in files.items()}
    return made if template is None else made | {"chat_template.jinja": template}


def _read_params(file: Path) -> Params:
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
    if params.vision_encoder is not None:
        _check_projector(params.vision_encoder)
    return params


def _refuse_unknown(found: Mapping[str, Any], known: type[msgspec.Struct], prefix: str) -> None:
    for name, value in found.items():
        if name in known.__struct_fields__ or value in (None, False, {}, [], "", *_IGNORED.get(name, ())):
            continue
        text = msgspec.json.encode(value).decode()[:80]
        raise ArtefactError(
            f"params.json of the model has {prefix}{name} = {text}, which this server does not read in Mistral's own "
            "format: serve the model in the Hugging Face format"
        )


def _check_projector(vision: Vision) -> None:
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


def _config(params: Params, directory: Path) -> dict[str, Any]:
    """Return the content of config.json."""
    text = {
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
        "max_position_embeddings": params.max_position_embeddings or params.max_seq_len or _DEFAULT_POSITIONS,
        "sliding_window": params.sliding_window,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    dtype = _stored_dtype(directory)
    shared = {} if dtype is None else {"dtype": dtype}
    vision = params.vision_encoder
    if vision is None:
        return {"architectures": ["MistralForCausalLM"], **text, **shared}
    same = (
        "hidden_size", "num_channels", "image_size", "patch_size", "rope_theta", "intermediate_size",
        "num_hidden_layers", "num_attention_heads",
    )  # fmt: skip
    if vision.mm_projector_id == "patch_merge":
        kind: dict[str, Any] = {
            "architectures": ["Mistral3ForConditionalGeneration"],
            "model_type": "mistral3",
            "spatial_merge_size": vision.spatial_merge_size,
        }
    else:
        kind = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "vision_feature_select_strategy": "full",
            "image_seq_length": 1,
        }
    return {
        **kind,
        **shared,
        "text_config": text,
        "vision_config": {
            "model_type": "pixtral",
            "hidden_act": "silu",
            **{name: getattr(vision, name) for name in same},
        },
        "image_token_index": vision.image_token_id,
        "vision_feature_layer": -1,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": vision.adapter_bias,
        "tie_word_embeddings": params.tied_embeddings,
    }


def _processor_files(vision: Vision, longest: int | None) -> dict[str, Any]:
    """Return preprocessor_config.json and processor_config.json. longest: an image's longest edge by tekken.json."""
    shared = {"processor_class": "PixtralProcessor", "patch_size": vision.patch_size}
    pixels = {
        "image_processor_type": "PixtralImageProcessor",
        **dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"), True),
        "size": {"longest_edge": longest or vision.max_image_size or vision.image_size},
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    tokens = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    return {
        "preprocessor_config.json": {**shared, **pixels},
        "processor_config.json": {**shared, **tokens, "spatial_merge_size": vision.spatial_merge_size},
    }


def _stored_dtype(directory: Path) -> str | None:
    """Return the type of the first tensor; None if it cannot be read, which is reported when the model is loaded."""
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    return _DTYPES.get(tensors.get_slice(name).get_dtype())
        except (OSError, SafetensorError):
            return None
    return None
