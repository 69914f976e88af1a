"""The model's shape, its files in the hub's format, and the one way pictures become numbers.

Writes and reads names as the hub's Llava checkpoints have them (``language_model.model.*``,
``vision_tower.vision_model.*``), which both transformers and vLLM load.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizer import BOS, EOS, IMAGE, PAD, VOCABULARY
from transformers import LlavaConfig, LlavaForConditionalGeneration

HERE = Path(__file__).resolve().parent
SIDE = 96  # pixels of the square that every picture is squeezed into
PATCH = 12
GRID = SIDE // PATCH
IMAGE_TOKENS = GRID * GRID
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
    "image_token_index": IMAGE,
    "image_seq_length": IMAGE_TOKENS,
    "ignore_index": -100,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "vocab_size": VOCABULARY,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
    "text_config": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "image_size": SIDE,
        "patch_size": PATCH,
        "num_channels": 3,
        "hidden_size": 160,
        "intermediate_size": 480,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 160,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    },
}
GENERATION = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False}
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "LlavaProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "resample": 3,
    "do_center_crop": False,
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
PROCESSOR = {
    "processor_class": "LlavaProcessor",
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "image_token": "<image>",
}
PLACES = "embeddings.position_embedding.weight"
# transformers' own names for the parts, and the hub's.
RENAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def squeeze(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """Return a picture as [SIDE, SIDE, 3] levels, as the image processor resizes it."""
    resized = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.uint8)


def normalise(levels: torch.Tensor) -> torch.Tensor:
    """Return [N, SIDE, SIDE, 3] levels as [N, 3, SIDE, SIDE] floats from -1 to 1, as the processor does."""
    return (levels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def create(seed: int = 0) -> LlavaForConditionalGeneration:
    """Return a model with random float32 weights."""
    torch.manual_seed(seed)
    config = LlavaConfig(**{k: v for k, v in CONFIG.items() if k not in ("dtype", "torch_dtype")})
    model = LlavaForConditionalGeneration(config).float()
    places = model.model.vision_tower.get_parameter(PLACES)
    with torch.no_grad():
        places[1:] = waves(GRID, places.shape[1])
    return model


def waves(grid: int, width: int) -> torch.Tensor:
    """Return starting values for the places of ``grid * grid`` patches: [patches, width], near ones alike.

    They are about as large as the patches' own values; the usual tiny ones hide from a small tower for long
    what lies beside what.
    """
    down, across = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    rates = 1.5 / 50 ** (torch.arange(width // 4) / (width // 4))
    turns = [axis.reshape(-1, 1) * rates for axis in (across, down)]
    return 0.35 * torch.cat([wave(turn) for turn in turns for wave in (torch.sin, torch.cos)], dim=1)


def hub_name(name: str) -> str:
    """Return the hub's name of a parameter that transformers calls ``name``."""
    for old, new in RENAMES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise ValueError(f"no name for {name!r} in the hub's format")


def export(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a whole model folder, replacing each file in it at once; ``weights`` have transformers' names."""
    folder.mkdir(parents=True, exist_ok=True)
    write_configs(folder)
    for name in TOKENIZER_FILES:
        if folder.resolve() != HERE:
            shutil.copyfile(HERE / name, folder / name)
    tensors = {hub_name(name): value.detach().to(torch.bfloat16).contiguous() for name, value in weights.items()}
    part = folder / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.chmod(0o644)
    part.rename(folder / "model.safetensors")


def write_configs(folder: Path) -> None:
    """Write every JSON file but the tokenizer's."""
    for name, content in (
        ("config.json", CONFIG),
        ("generation_config.json", GENERATION),
        ("preprocessor_config.json", PREPROCESSOR),
        ("processor_config.json", PROCESSOR),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return an exported folder's weights in float32, by the hub's names."""
    return {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
