"""Tiny random models in the hub's format, made from configs: every family and text decoder that is served."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from tests.support.backend import VLLM

VOCAB = 320
VLLM_SIZE = {"hidden_size": 128}
"""Of decoders that vLLM serves: its CPU attention wants heads of 32 and more."""

HUB_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("vision_tower.vision_model.", "vision_tower.vision_model."),
    ("vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
)
"""Prefixes as transformers writes them, and as the hub's checkpoints have them, which alone vLLM's loader knows."""

SPECIALS = ["<s>", "</s>", "<pad>", "<image>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(
    chat_template: str | None = CHAT_TEMPLATE,
    *,
    more: Sequence[str] = (),
    merges: Sequence[tuple[str, str]] = (),
) -> PreTrainedTokenizerFast:
    """Byte level, no merges unless given: any text is encodable and ids are easy to reason about.

    more: special tokens behind `SPECIALS`. merges: of characters of the byte-level alphabet; their tokens come last.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [*SPECIALS, *more]
    words = [*alphabet, *special, *("".join(pair) for pair in merges)]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        clean_up_tokenization_spaces=False, model_max_length=1 << 30,
    )  # fmt: skip
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def text_config(kind: str = "llama", **overrides: Any) -> PretrainedConfig:
    """A decoder of two layers; grouped-query attention, and a sliding window for Mistral."""
    shared: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }  # fmt: skip
    kinds: dict[str, Any] = {
        "gemma": GemmaConfig, "gemma2": Gemma2Config, "gemma3_text": Gemma3TextConfig, "llama": LlamaConfig,
        "mistral": MistralConfig, "phi3": Phi3Config, "qwen2": Qwen2Config, "qwen3": Qwen3Config,
    }  # fmt: skip
    if kind == "mistral":
        shared["sliding_window"] = 24
    if kind.startswith("gemma"):
        # heads of another size than hidden_size / heads, and tied weights, as published
        shared |= {"head_dim": 24, "tie_word_embeddings": True}
    if kind == "gemma2":
        # caps so low that they change the answers
        shared |= {"sliding_window": 24, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0}
        shared["final_logit_softcapping"] = 3.0
    if kind == "gemma3_text":
        layers = ["sliding_attention", "full_attention"]
        shared |= {"sliding_window": 24, "query_pre_attn_scalar": 20, "layer_types": layers}
    if kind == "qwen3":
        shared["head_dim"] = 24  # not hidden_size / heads, as in all of Qwen3's
    return kinds[kind](**{**shared, **overrides})


def make_text_model(path: Path, kind: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(text_config(kind, **overrides))
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    write_generation_config(path)
    return path


def make_llava(
    path: Path,
    *,
    tower: str = "clip",
    text: str = "llama",
    seed: int = 0,
    strategy: str = "default",
    **overrides: Any,
) -> Path:
    """A Llava of 28-pixel images: 16 patches, so 16 tokens (17 with CLIP's class token, 15 for SigLIP with
    "default", which cuts the first row off)."""
    if VLLM:
        overrides = VLLM_SIZE | overrides
    torch.manual_seed(seed)
    vision: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 7,
    }  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, initializer_range=0.5, initializer_factor=4.0)
        if tower == "clip"
        else SiglipVisionConfig(**vision),
        text_config=text_config(text, **overrides),
        image_token_index=259,
        vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
        image_seq_length=16,
    )
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if ("vision_tower" in name or "projector" in name) and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    if VLLM:
        write_hub_names(path / "model.safetensors")
    make_tokenizer().save_pretrained(path)
    size = {"height": 28, "width": 28}
    processor = (
        CLIPImageProcessor(size=size, do_center_crop=False) if tower == "clip" else SiglipImageProcessor(size=size)
    )
    processor.save_pretrained(path)
    preprocessor = json.loads((path / "preprocessor_config.json").read_text())
    preprocessor["processor_class"] = "LlavaProcessor"
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (path / "processor_config.json").write_text(
        json.dumps(
            {
                "processor_class": "LlavaProcessor",
                "patch_size": 7,
                "image_token": "<image>",
                "vision_feature_select_strategy": strategy,
                "num_additional_image_tokens": 1 if tower == "clip" else 0,
            }
        )
    )
    write_generation_config(path)
    return path


def write_hub_names(weights: Path, names: Sequence[tuple[str, str]] = HUB_NAMES) -> None:
    tensors = {}
    for name, tensor in load_file(weights).items():
        ours, hub = next((pair for pair in names if name.startswith(pair[0])), ("", ""))
        tensors[hub + name.removeprefix(ours)] = tensor
    save_file(tensors, weights, {"format": "pt"})


def write_generation_config(path: Path) -> None:
    (path / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 256, "eos_token_id": [257, 263], "pad_token_id": 258})
    )
