"""Models in Mistral's own format, as Pixtral-12B-2409 is published: `params.json`, `tekken.json`, `consolidated*`.

The files of the Hugging Face format that such a model lacks are written into a directory that also links to all the
files that it has; everything else in this server reads that directory. The weights are not copied: the embedded engine
converts them while it loads them (`engine.weights`), and vLLM reads them itself. The fields of `params.json` mean what
they mean in vLLM's vllm/transformers_utils/configs/mistral.py; the format of `tekken.json`, and the ids of its tokens,
are as in mistral_common's tokens/tokenizers/tekken.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from safetensors import SafetensorError, safe_open

from handlers.artefacts import ArtefactError

logger = logging.getLogger(__name__)

PARAMS, TEKKEN = "params.json", "tekken.json"

_FORMAT = b"2"
"""Version of what is written here; directories that another version wrote are not used."""

_DEFAULT_POSITIONS = 128_000  # as in vLLM

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

_IGNORED: Mapping[str, tuple[object, ...]] = {
    "model_type": ("transformer",),
    "activation": ("silu",),
    "causal": (True,),
    "dtype": tuple(_DTYPES.values()),
}
"""Values with which a field that is not read here changes nothing, besides null, false and whatever is empty."""

VERSIONS = ("v3", "v7", "v11", "v13", "v15")
"""Versions of the tokenizer whose chats mistral.jinja writes."""

_Size = Annotated[int, msgspec.Meta(ge=1)]


class Vision(msgspec.Struct, kw_only=True):
    """`vision_encoder`. max_image_size: the longest edge of an image in pixels; if null, it is image_size."""

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


def chat_template(tekken: Tekken) -> str | None:
    """Return the chat template for a tokenizer of Mistral's; None if the format of its chats is not known."""
    version = tekken.config.version
    if version not in VERSIONS:
        return None
    template = Path(__file__).with_name("mistral.jinja").read_text(encoding="utf-8")
    effort = tekken.reasoning_effort
    known = {"version": int(version[1:]), "efforts": effort.values, "default_effort": effort.default}
    values = (f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in known.items())
    return "".join(values) + template


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
    tekken: Tekken | None = None
    template: str | None = None
    if (directory / TEKKEN).is_file():
        tekken = read_tekken(directory / TEKKEN)
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


UNLISTED_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""The special tokens, in the order of their ids, of older files, which do not list them."""


class _Special(msgspec.Struct):
    rank: int
    token_str: str


class _Token(msgspec.Struct):
    token_bytes: str


class _Config(msgspec.Struct):
    pattern: str
    default_vocab_size: int
    default_num_special_tokens: int
    version: str


class _Image(msgspec.Struct):
    max_image_size: int


class _Effort(msgspec.Struct):
    """Efforts of reasoning that the model knows, and which it takes where a request does not say."""

    values: list[str] = []
    default: str = ""


class _Settings(msgspec.Struct):
    reasoning_effort: _Effort | None = None


class Tekken(msgspec.Struct):
    """tekken.json. `multimodal` is the older name of `image`."""

    config: _Config
    vocab: list[_Token]
    special_tokens: list[_Special] | None = None
    image: _Image | None = None
    multimodal: _Image | None = None
    model_settings_builder: _Settings | None = None

    @property
    def reasoning_effort(self) -> _Effort:
        """The efforts of reasoning that are written into a prompt; there are none before version 15."""
        settings = self.model_settings_builder
        return (settings and settings.reasoning_effort) or _Effort()

    @property
    def longest(self) -> int | None:
        """The longest edge that an image may have, in pixels; None if the file does not say."""
        image = self.image or self.multimodal
        return None if image is None else image.max_image_size

    @property
    def special(self) -> list[str]:
        """The special tokens in the order of their ids, with those that fill up their number."""
        named = list(UNLISTED_SPECIAL)
        if self.special_tokens is not None:
            named = [token.token_str for token in sorted(self.special_tokens, key=lambda token: token.rank)]
        return named + [f"<SPECIAL_{at}>" for at in range(len(named), self.config.default_num_special_tokens)]


def read_tekken(file: Path) -> Tekken:
    """Read and check the file. Raises ArtefactError if it is not such a tokenizer."""
    try:
        tekken = msgspec.json.decode(file.read_bytes(), type=Tekken)
    except OSError as error:
        raise ArtefactError(f"{file} cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ArtefactError(f"tekken.json of the model is not one of Mistral's tokenizers: {error}") from error
    count, sizes, special = tekken.config.default_num_special_tokens, tekken.config, tekken.special
    ranks = [token.rank for token in tekken.special_tokens or ()]
    if sorted(ranks) != list(range(len(ranks))) or len(special) != count or len(set(special)) != count:
        raise ArtefactError(
            f"tekken.json of the model lists special tokens that are not the {count} of its "
            "default_num_special_tokens, numbered from 0: fetch it again"
        )
    if not 256 <= sizes.default_vocab_size - count <= len(tekken.vocab):
        raise ArtefactError(
            f"tekken.json of the model has {len(tekken.vocab)} tokens and {count} special ones, which do not fit its "
            f"default_vocab_size {sizes.default_vocab_size}: fetch it again"
        )
    return tekken


def tokenizer_files(tekken: Tekken) -> dict[str, Any]:
    """Return the contents of tokenizer.json and tokenizer_config.json."""
    special = tekken.special
    ranks = _ranks(tekken)
    text = {piece: "".join(_ALPHABET[byte] for byte in piece) for piece in ranks}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": tekken.config.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, "special": True}
            | dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
            for number, token in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [special.index("<s>")], "tokens": ["<s>"]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {token: number for number, token in enumerate([*special, *text.values()])},
            "merges": [[text[left], text[right]] for left, right in _merges(ranks)],
        },
    }
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in named.items() if token in special},
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _ranks(tekken: Tekken) -> dict[bytes, int]:
    """Return the rank of each ordinary token, by its bytes. The file may list more tokens than the model has."""
    listed = tekken.vocab[: tekken.config.default_vocab_size - tekken.config.default_num_special_tokens]
    try:
        ranks = {base64.b64decode(token.token_bytes): rank for rank, token in enumerate(listed)}
    except ValueError as error:
        raise ArtefactError("tekken.json of the model has token_bytes that are not base64: fetch it again") from error
    if len(ranks) != len(listed) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ArtefactError("tekken.json of the model lists a token twice, or not every byte: fetch it again")
    return ranks


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield all pairs of tokens that form another token, by its rank: the order in which they are merged."""
    for piece in ranks:
        pairs = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _alphabet() -> dict[int, str]:
    """Return the character that stands for each byte in byte-level vocabularies.

    A visible character stands for itself; the others are numbered from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + at) for at, byte in enumerate(others)}


_ALPHABET = _alphabet()
