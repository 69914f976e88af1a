"""Write a random Llava in the hub's format, which transformers, vLLM and our engine load alike.

    python -m bench.models FOLDER [--size 1.5m|212m|7b]

Its tokens all stand for ASCII text, and it never ends a reply by itself, so that every generated token reaches
the client and every reply is as long as was asked for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Matrix = Callable[[int, int], torch.Tensor]

SPECIALS = ("<s>", "</s>", "<pad>", "<image>")
BOS, EOS, PAD, IMAGE = range(4)
PATCH = 14
TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ['image', 'image_url'] %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """The dimensions of a model; `side` is that of an image in pixels."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    feed_forward: int
    vision_feed_forward: int
    side: int = 112
    context: int = 4096

    @property
    def image_tokens(self) -> int:
        return (self.side // PATCH) ** 2


SIZES = {
    "1.5m": Size(128, 2, 4, 2, 4096, 64, 2, 2, 384, 128),
    "212m": Size(1024, 12, 16, 8, 24576, 512, 4, 8, 3072, 1024),
    "7b": Size(4096, 32, 32, 32, 32064, 1024, 24, 16, 11008, 4096, side=336),
}
"""The last has the numbers of llava-hf/llava-1.5-7b-hf: 14 GB, for a GPU."""


def write(folder: Path, size: str = "1.5m", seed: int = 0) -> Path:
    """Write the model of a size into a folder, made if need be, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = SIZES[size]
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in _weights(shape, seed)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer(shape.vocabulary).save(str(folder / "tokenizer.json"))
    for name, content in _files(shape).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def tokenizer(vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE of that many tokens: specials, bytes, then pairs and fours of letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(left, right) for left in ascii_lowercase for right in ascii_lowercase]
    fours = ((left[0] + left[1], right[0] + right[1]) for left in pairs for right in pairs)
    room = vocabulary - len(SPECIALS) - len(alphabet)
    merges = list(itertools.islice(itertools.chain(pairs, fours), room))
    tokens = [*SPECIALS, *alphabet, *(left + right for left, right in merges)]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return made


def _weights(size: Size, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    torch.manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns) / math.sqrt(columns)

    width, head = size.width, size.width // size.heads
    yield "language_model.model.embed_tokens.weight", torch.randn(size.vocabulary, width)
    for layer in range(size.layers):
        name = f"language_model.model.layers.{layer}."
        for part, rows, columns in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", size.kv_heads * head, width),
            ("self_attn.v_proj", size.kv_heads * head, width),
            ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", size.feed_forward, width),
            ("mlp.up_proj", size.feed_forward, width),
            ("mlp.down_proj", width, size.feed_forward),
        ):
            yield f"{name}{part}.weight", matrix(rows, columns)
        yield name + "input_layernorm.weight", torch.ones(width)
        yield name + "post_attention_layernorm.weight", torch.ones(width)
    yield "language_model.model.norm.weight", torch.ones(width)
    output = matrix(size.vocabulary, width)
    decode = tokenizer(size.vocabulary).decode
    silent = [i for i in range(len(SPECIALS) + 256) if not _plain(decode([i]))]
    output[silent] = 0.0  # below the largest of the other, random logits
    yield "language_model.lm_head.weight", output
    yield from _vision(size, matrix)
    for part, rows, columns in (("linear_1", width, size.vision_width), ("linear_2", width, width)):
        yield f"multi_modal_projector.{part}.weight", matrix(rows, columns)
        yield f"multi_modal_projector.{part}.bias", torch.zeros(rows)


def _vision(size: Size, matrix: Matrix) -> Iterator[tuple[str, torch.Tensor]]:
    width = size.vision_width
    name = "vision_tower.vision_model."
    yield name + "embeddings.class_embedding", torch.randn(width)
    yield name + "embeddings.patch_embedding.weight", matrix(width, 3 * PATCH**2).view(width, 3, PATCH, PATCH)
    yield name + "embeddings.position_embedding.weight", torch.randn(size.image_tokens + 1, width)
    norms = ["pre_layrnorm", "post_layernorm"]
    for layer in range(size.vision_layers):
        inner = f"encoder.layers.{layer}."
        norms += [inner + "layer_norm1", inner + "layer_norm2"]
        for part, rows, columns in (
            *((f"self_attn.{which}_proj", width, width) for which in ("q", "k", "v", "out")),
            ("mlp.fc1", size.vision_feed_forward, width),
            ("mlp.fc2", width, size.vision_feed_forward),
        ):
            yield f"{name}{inner}{part}.weight", matrix(rows, columns)
            yield f"{name}{inner}{part}.bias", torch.zeros(rows)
    for norm in norms:
        yield f"{name}{norm}.weight", torch.ones(width)
        yield f"{name}{norm}.bias", torch.zeros(width)


def _plain(text: str) -> bool:
    return text != "" and text.isascii() and text.isprintable()


def _files(size: Size) -> dict[str, dict[str, object]]:
    ends = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    square = {"height": size.side, "width": size.side}
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "image_token_index": IMAGE,
        "image_seq_length": size.image_tokens,
        "ignore_index": -100,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        **ends,
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": size.vocabulary,
            "hidden_size": size.width,
            "intermediate_size": size.feed_forward,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "head_dim": size.width // size.heads,
            "max_position_embeddings": size.context,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
            **ends,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": size.side,
            "patch_size": PATCH,
            "hidden_size": size.vision_width,
            "intermediate_size": size.vision_feed_forward,
            "num_hidden_layers": size.vision_layers,
            "num_attention_heads": size.vision_heads,
            "projection_dim": size.vision_width,
        },
    }
    return {
        "config.json": config,
        "generation_config.json": {**ends, "do_sample": False},
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size.side},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": SPECIALS[IMAGE],
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "LlavaProcessor",
            "bos_token": SPECIALS[BOS],
            "eos_token": SPECIALS[EOS],
            "pad_token": SPECIALS[PAD],
            "image_token": SPECIALS[IMAGE],
            "additional_special_tokens": [SPECIALS[IMAGE]],
            "clean_up_tokenization_spaces": False,
            "model_max_length": size.context,
            "padding_side": "left",
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a random Llava in the hub's format.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.5m")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(write(arguments.folder, arguments.size, arguments.seed))
