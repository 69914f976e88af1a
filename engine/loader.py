"""Loads a model from a directory in the hub's format, and answers what can be known without its weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging as transformers_logging

from engine.config import EngineConfig
from engine.errors import ModelLoadError, one_line
from engine.families.base import Family, FamilyModel
from engine.families.pixels import ProcessorBackend
from engine.families.preprocessor import Preprocessor
from engine.families.registry import family_of, kind_of, register, served
from engine.fused import FusedDecoder, stack
from engine.machine import computes_bfloat16
from engine.packed_linear import pack, quantize
from engine.tensor_parallel import Ranks
from engine.weights import JUDGED, MISTRAL_CLASSES, are_mistrals, complete, mistral_state_dict, weight_files

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(model_path: str) -> PretrainedConfig:
    """Read config.json.

    Raises:
        ModelLoadError: transformers does not understand the directory's config.json, or this engine does not
            serve such a model.
    """
    try:
        stored, _ = PretrainedConfig.get_config_dict(model_path)
        register(str(stored.get("model_type")))
        config: PretrainedConfig = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    except Exception as error:  # a damaged file may raise any error
        raise ModelLoadError(f"config.json of the model cannot be read: {one_line(error)}") from error
    _family(config).model.check(config)
    return config


def quiet_transformers() -> None:
    """Silence transformers' progress bars and its advice to install torchvision, useless in a server's log."""
    library: Any = transformers_logging
    library.disable_progress_bar()
    library.set_verbosity_error()


def _family(config: PretrainedConfig) -> Family:
    """Find the family of a model.

    Raises:
        ModelLoadError: The model type has no family; the message names those that have one.
    """
    family = family_of(kind_of(config))
    if family is None:
        raise ModelLoadError(
            f"model type {config.model_type!r} is not served by the embedded engine; it serves {served()}"
        )
    return family


def load_preprocessor(
    model_path: str, overrides: dict[str, Any] | None = None, backend: ProcessorBackend = "auto"
) -> Preprocessor[Any] | None:
    """Load the front end's half of the family, without weights.

    Args:
        model_path: Directory of the model.
        overrides: Replacements for fields of the processor's configuration.
        backend: Image processor to use.

    Returns:
        The preprocessor; None for a text-only model.

    Raises:
        ModelLoadError: The model's image processor does not support this backend.
    """
    quiet_transformers()
    kind = _family(read_config(model_path)).preprocessor
    return None if kind is None else kind.from_model(model_path, overrides, backend)


class Precision(NamedTuple):
    """Type in which a model computes.

    Attributes:
        dtype: The type.
        reason: Why it was chosen, for the log.
        lossy: Whether it has fewer digits than the stored weights.
    """

    dtype: torch.dtype
    reason: str
    lossy: bool = False


def resolve_dtype(config: PretrainedConfig, name: str, device_type: str, *, bfloat16: bool) -> Precision:
    """Choose the type in which a model computes.

    "auto" follows config.json if the device computes in that type at full speed. A CPU that does not uses
    float32, which loses nothing. On an accelerator the rule is vLLM's (`_resolve_auto_dtype`): float32
    becomes bfloat16, or float16 if the device does not support bfloat16.

    Args:
        config: Configuration of the model.
        name: "auto", or the name of a type.
        device_type: "cpu" or "cuda".
        bfloat16: Whether the device computes in bfloat16.
    """
    if name != "auto":
        return Precision(DTYPES[name], "option.dtype says so")
    stored = config.dtype or getattr(config.get_text_config(), "dtype", None)
    dtype = stored if isinstance(stored, torch.dtype) else DTYPES.get(str(stored).removeprefix("torch."))
    half = torch.bfloat16 if bfloat16 else torch.float16
    if dtype is None:
        return Precision(torch.float32, "config.json does not name a type")
    stored_in = str(dtype).removeprefix("torch.")
    if device_type == "cpu" and (dtype == torch.float16 or (dtype == torch.bfloat16 and not bfloat16)):
        why = (
            f"the model is stored in {stored_in}, in which this CPU does not compute fast; "
            "float32 holds the same numbers"
        )
        return Precision(torch.float32, why)
    if device_type == "cuda" and dtype == torch.float32:
        why = "the model is stored in float32; as with vLLM it uses a 16-bit type here; option.dtype=float32 keeps it"
        return Precision(half, why, lossy=True)
    if device_type == "cuda" and dtype == torch.bfloat16 and not bfloat16:
        return Precision(half, "the model is stored in bfloat16, in which this accelerator does not compute", True)
    return Precision(dtype, "as the model is stored")


def check_ranks(model_path: str, size: int) -> None:
    """Check that tensor-parallel ranks can share the model.

    Raises:
        ModelLoadError: The model cannot be divided among `size` ranks.
    """
    config = read_config(model_path)
    _family(config).model.check_ranks(config, size)


def load_model(config: EngineConfig, device: torch.device, ranks: Ranks | None = None) -> FamilyModel:
    """Load the weights, or this rank's part of them if several ranks share the model.

    Raises:
        ModelLoadError: The model cannot be loaded.
    """
    quiet_transformers()
    model_config = read_config(config.model_path)
    files = weight_files(
        Path(config.model_path),
        pickled=config.pickled_weights,
        named=getattr(model_config, "transformers_weights", None),
    )
    dtype, reason, lossy = resolve_dtype(
        model_config, config.dtype, device.type, bfloat16=computes_bfloat16(device.type)
    )
    if ranks is None or ranks.rank == 0:
        level = logging.WARNING if lossy else logging.INFO
        logger.log(level, "computing in %s: %s", str(dtype).removeprefix("torch."), reason)
    family = _family(model_config).model
    try:
        if are_mistrals(files):
            loaded = _load_mistrals(family, files, model_config, dtype)
        else:
            loaded = family.load(
                config.model_path,
                model_config,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=None if config.pickled_weights else True,
                weights_only=True,
            )
    except ModelLoadError:
        raise
    except Exception as error:  # as above; safetensors' own error is not an OSError
        raise ModelLoadError(f"the model's weights cannot be loaded: {one_line(error)}") from error
    loaded.model.train(mode=False)
    if ranks is not None:
        loaded.shard(ranks)
    torch.nn.Module.to(loaded.model, device)
    if device.type == "cpu":
        stack(loaded.decoder)
        loaded.fused = FusedDecoder.of(loaded.decoder)
        if config.int8:
            _quantize(loaded.decoder)
        pack(loaded.model)
    return loaded


def _load_mistrals(
    family: type[FamilyModel], files: Sequence[Path], config: PretrainedConfig, dtype: torch.dtype
) -> FamilyModel:
    """Load weights in Mistral's own format."""
    name = MISTRAL_CLASSES.get(kind_of(config))
    if name is None:
        raise ModelLoadError(
            f"the model has its weights as {files[0].name}, Mistral's own format, which is not read for model type "
            f"{config.model_type!r}: serve the model in the Hugging Face format"
        )
    weights = mistral_state_dict(files, config)
    loader = getattr(transformers, name)
    attention = family.attention(config)
    given = {"config": config, "state_dict": weights, "dtype": dtype, "attn_implementation": attention}
    judged = loader.from_pretrained(None, **given, **JUDGED)
    return family(complete(judged, family.unused_weights(config)))


def _quantize(decoder: torch.nn.Module) -> None:
    try:
        quantize(decoder)
    except (AttributeError, RuntimeError) as error:  # oneDNN's operators are missing, or refuse
        raise ModelLoadError(
            f"option.quantize=int8 does not work on this CPU; leave it out: {one_line(error)}"
        ) from error
