"""Tiny Phi-3 Vision models in the hub's format: flat config.json, the names of its weights, its processor's file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3ForCausalLM, PreTrainedTokenizerFast

from tests.support import phi3_v_code
from tests.support.backend import VLLM
from tests.support.models import VLLM_SIZE, make_tokenizer, text_config, write_generation_config

TILE, PATCH, MOST, LIMIT = 28, 7, 6, 96
"""LIMIT: the most tokens of a request that has the short frequencies."""
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": TILE, "patch_size": PATCH,
}  # fmt: skip
VLLM_VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16,
    "image_size": phi3_v_code.TILE, "patch_size": 14,
}  # fmt: skip
"""vLLM's tower has these sizes, whatever config.json says."""
VLLM_IMAGE, VLLM_VOCAB = 32044, 32064
"""vLLM's code has this image token."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{- '<|assistant|>\n' -}}"
    "{% endif %}"
)


def make_phi3_v(
    path: Path, *, seed: int = 0, bos: bool = True, names: Sequence[str] = ("embed_tokens",), **config: Any
) -> Path:
    """bos: the tokenizer begins a text with it. names: of the embeddings, which the hub's may have two of."""
    torch.manual_seed(seed)
    pairs, tower_of = (16, VLLM_VISION) if VLLM else (8, VISION)
    text = text_config(
        "phi3",
        max_position_embeddings=2048 if VLLM else 1024,
        original_max_position_embeddings=LIMIT,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
            "long_factor": [2.0 + pair for pair in range(pairs)],
        },
        **(VLLM_SIZE | {"vocab_size": VLLM_VOCAB} if VLLM else {}),
    )
    tensors = dict(Phi3ForCausalLM(text).state_dict())
    vision = "model.vision_embed_tokens."
    tower = CLIPVisionModel(CLIPVisionConfig(**tower_of))
    for name, tensor in tower.state_dict().items():
        if not name.endswith("position_ids"):
            tensors[f"{vision}img_processor.vision_model.{name}"] = tensor
    width, merged = text.hidden_size, 4 * tower_of["hidden_size"]
    for name, shape in (
        ("glb_GN", (1, 1, merged)),
        ("sub_GN", (1, 1, 1, merged)),
        ("img_projection.0.weight", (width, merged)),
        ("img_projection.0.bias", (width,)),
        ("img_projection.2.weight", (width, width)),
        ("img_projection.2.bias", (width,)),
    ):
        tensors[vision + name] = torch.empty(shape)
    for name, tensor in tensors.items():
        # so large that the images decide the answers
        if name.startswith(vision) and (tensor.ndim > 1 or "bias" in name):
            torch.nn.init.normal_(tensor, std=0.05 if VLLM else 0.3)
    embeddings = tensors.pop("model.embed_tokens.weight")
    tensors |= {f"model.{name}.weight": embeddings for name in names}
    path.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path / "model.safetensors", {"format": "pt"})
    stored = json.loads(text.to_json_string(use_diff=False))
    rope = stored.pop("rope_parameters")
    stored |= {
        "architectures": ["Phi3VForCausalLM"],
        "model_type": "phi3_v",
        "auto_map": {
            "AutoConfig": "phi3_v_code.Phi3VConfig",
            "AutoModelForCausalLM": "phi3_v_code.Phi3VForCausalLM",
        },
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {
            "type": "su", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"],
        },
        "img_processor": {
            "name": "clip_vision_model", "model_name": "openai/clip-vit-large-patch14-336",
            "image_dim_out": tower_of["hidden_size"], "num_img_tokens": 144,
        },
        "embd_layer": {
            "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp",
            "use_hd_transform": True, "with_learnable_separator": True,
        },
        "vision_config": tower_of,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(stored | config))
    tokenizer = make_tokenizer(TEMPLATE, more=("<|image|>",))
    if bos:
        begin_with_bos(tokenizer)
    tokenizer.save_pretrained(path)
    if VLLM:
        _move_image_token(path / "tokenizer.json")
    shutil.copy(phi3_v_code.__file__, path)
    preprocessor = {
        "auto_map": {
            "AutoImageProcessor": "phi3_v_code.Phi3VImageProcessor",
            "AutoProcessor": "phi3_v_code.Phi3VProcessor",
        },
        "do_convert_rgb": True, "image_processor_type": "Phi3VImageProcessor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "num_crops": phi3_v_code.MOST if VLLM else MOST, "num_img_tokens": 144, "processor_class": "Phi3VProcessor",
    }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    write_generation_config(path)
    return path


def _move_image_token(file: Path) -> None:
    """Give it the id that vLLM's code has; the words between are never read."""
    stored = json.loads(file.read_text())
    words = stored["model"]["vocab"]
    begin = words.pop("<|image|>")
    words |= {f"filler{number} ": number for number in range(begin, VLLM_IMAGE)} | {"<|image|>": VLLM_IMAGE}
    next(added for added in stored["added_tokens"] if added["id"] == begin)["id"] = VLLM_IMAGE
    file.write_text(json.dumps(stored))


def begin_with_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
