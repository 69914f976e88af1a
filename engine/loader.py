"""From a directory in the hub's format to a `Family` on its device, and nothing that needs weights to know it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from engine.attention.bridge import IMPLEMENTATION
from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.families.base import Family
from engine.families.llava import LlavaFamily
from engine.families.llava_pictures import num_image_tokens
from engine.families.pictures import PREPROCESSORS
from engine.families.pixels import ProcessorBackend
from engine.families.preprocessor import Preprocessor
from engine.families.text import TextFamily
from engine.tensor_parallel import Ranks, shard

logger = logging.getLogger(__name__)

VISION_FAMILIES: dict[str, type[Family]] = {"llava": LlavaFamily}
"""config.json's `model_type` -> the engine's half of the family; `engine.families.pictures` has the front's."""

TEXT_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2"})
"""Decoders that are tested to give the tokens of transformers' own `generate`."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(model_path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Raises ModelLoadError for a directory without a config.json that transformers understands, and for a
    model that this engine does not serve."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"config.json of the model cannot be read: {error}") from error
    check_supported(config)
    return config


def quiet_transformers() -> None:
    """Its progress bars and its advice to install torchvision are of no use in a server's log."""
    library: Any = transformers_logging
    library.disable_progress_bar()
    library.set_verbosity_error()


def check_supported(config: PretrainedConfig) -> None:
    """Raise ModelLoadError, naming what is supported, for a model type that has no family here."""
    model_type = config.model_type
    if model_type == "llava":
        num_image_tokens(config)
        model_type = config.text_config.model_type
    elif model_type in VISION_FAMILIES:
        return
    if model_type not in TEXT_MODEL_TYPES:
        raise ModelLoadError(
            f"model type {model_type!r} is not served by the embedded engine; it serves "
            f"{', '.join(sorted(VISION_FAMILIES))} and the text models {', '.join(sorted(TEXT_MODEL_TYPES))}"
        )


def load_preprocessor(
    model_path: str, overrides: dict[str, Any] | None = None, backend: ProcessorBackend = "auto"
) -> Preprocessor | None:
    """The front's half of the family; None for a text-only model. Loads no weights.

    Raises ModelLoadError where the model's picture processor cannot work with this backend.
    """
    quiet_transformers()
    config = read_config(model_path)
    kind = PREPROCESSORS.get(config.model_type)
    return None if kind is None else kind.from_model(model_path, overrides, backend)


def resolve_dtype(config: PretrainedConfig, name: str, device: torch.device) -> torch.dtype:
    """The type to compute in. "auto" follows config.json where the device computes in it at full speed."""
    if name != "auto":
        return DTYPES[name]
    stored = config.dtype or getattr(config.get_text_config(), "dtype", None)
    dtype = stored if isinstance(stored, torch.dtype) else DTYPES.get(str(stored).removeprefix("torch."))
    if dtype is None:
        return torch.float32
    if device.type == "cpu" and (dtype == torch.float16 or not _cpu_has_fast_bfloat16()):
        return torch.float32
    if device.type == "cuda" and dtype == torch.float32:
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return dtype


def load_family(config: EngineConfig, device: torch.device, ranks: Ranks | None = None) -> Family:
    """Load the weights, and keep this rank's part of them where the model is shared by several ranks."""
    quiet_transformers()
    model_config = read_config(config.model_path, trust_remote_code=config.trust_remote_code)
    dtype = resolve_dtype(model_config, config.dtype, device)
    vision = VISION_FAMILIES.get(model_config.model_type)
    loader = AutoModelForCausalLM if vision is None else AutoModelForImageTextToText
    try:
        model: PreTrainedModel = loader.from_pretrained(
            config.model_path,
            dtype=dtype,
            attn_implementation=_attention(model_config),
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ModelLoadError(f"the model's weights cannot be loaded: {error}") from error
    model.train(mode=False)
    family = (TextFamily if vision is None else vision)(model)
    if ranks is not None:
        shard(family.decoder, family.text_config, ranks)
    torch.nn.Module.to(model, device)
    return family


def _attention(config: PretrainedConfig) -> str | dict[str, str]:
    """Ours for the decoder, PyTorch's for the vision tower."""
    if "text_config" not in config.sub_configs:
        return IMPLEMENTATION
    return {name: IMPLEMENTATION if name == "text_config" else "sdpa" for name in config.sub_configs}


def _cpu_has_fast_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
