"""Models in Mistral's own format as mistralai/Pixtral-12B-2409 and Mistral-Small-3.1 publish it, scaled down."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from handlers.artefacts.tekken import UNLISTED_SPECIAL

SPECIAL, VOCAB = 20, 320
IMG, IMG_BREAK, IMG_END = 10, 12, 13
UNIT, LONGEST = 8, 64
"""Pixels of a token's edge, and of the longest that an image may have."""

NEWER = ("[AUDIO]", "[BEGIN_AUDIO]", "[ARGS]", "[CALL_ID]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]")
"""Special tokens of version 11 and later, whose files list all of them; the first are as before."""

WORDS = (b" a", b" red", b" circle", b"th", b"the", b"\n\n", b" the")

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def params(*, merge: int = 1, images: bool = True, **changed: Any) -> dict[str, Any]:
    """Of Pixtral, or of Mistral Small 3.1 where squares of merge x merge features become one."""
    found: dict[str, Any] = {
        "dim": 128, "n_layers": 2, "head_dim": 32, "hidden_dim": 160, "n_heads": 8, "n_kv_heads": 2,
        "rope_theta": 1000000000.0, "norm_eps": 1e-05, "vocab_size": VOCAB,
    }  # fmt: skip
    if images:
        found["vision_encoder"] = {
            "hidden_size": 64, "num_channels": 3, "image_size": LONGEST, "patch_size": UNIT // merge,
            "rope_theta": 10000.0, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
            "adapter_bias": merge == 1, "image_token_id": IMG, "image_break_token_id": IMG_BREAK,
            "image_end_token_id": IMG_END,
        }  # fmt: skip
        if merge > 1:
            found["vision_encoder"] |= {
                "spatial_merge_size": merge,
                "mm_projector_id": "patch_merge",
                "add_pre_mm_projector_layer_norm": True,
                "max_image_size": LONGEST,
            }
    return found | changed


def tekken(*, version: str = "v3", merge: int = 1, images: bool = True) -> dict[str, Any]:
    """More tokens are listed than the model has, as in the published files."""
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [b"re", b"ed", b" c", b"ir", b" r", b"le", *WORDS]
    newer = int(version[1:]) >= 11
    special = SPECIAL + len(NEWER) if newer else SPECIAL
    pieces += [f"{number:03}".encode() for number in range(VOCAB - special - len(pieces) + 7)]
    found: dict[str, Any] = {
        "config": {
            "pattern": PATTERN, "num_vocab_tokens": len(pieces), "default_vocab_size": VOCAB,
            "default_num_special_tokens": special, "version": version,
        },
        "vocab": [
            {
                "rank": rank,
                "token_bytes": base64.b64encode(piece).decode(),
                "token_str": piece.decode(errors="replace"),
            }
            for rank, piece in enumerate(pieces)
        ],
    }  # fmt: skip
    if newer:
        names = [*UNLISTED_SPECIAL, *NEWER]
        found["special_tokens"] = [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
        ]
    if version == "v15":
        effort = {"type": "enum", "accepts_none": True, "default": "none", "values": ["none", "high"]}
        found["model_settings_builder"] = {"reasoning_effort": effort}
    if images:
        found["image"] = {"image_patch_size": UNIT // merge, "max_image_size": LONGEST}
        if merge > 1:
            found["image"]["spatial_merge_size"] = merge
    return found


def weights(of: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """By Mistral's names. Those of the tower are so large that images change what is said of them."""
    random = torch.Generator().manual_seed(seed)

    def matrix(rows: int, *columns: int, std: float = 0.2) -> torch.Tensor:
        return torch.randn(rows, *columns, generator=random) * std

    def norm(size: int) -> torch.Tensor:
        return 1 + matrix(size, std=0.1)

    dim, hidden, head = of["dim"], of["hidden_dim"], of["head_dim"]
    queries, keys = of["n_heads"] * head, of["n_kv_heads"] * head
    found = {
        "tok_embeddings.weight": matrix(VOCAB, dim),
        "norm.weight": norm(dim),
        "output.weight": matrix(VOCAB, dim),
    }
    for layer in range(of["n_layers"]):
        place = f"layers.{layer}."
        found |= {
            f"{place}attention.wq.weight": matrix(queries, dim),
            f"{place}attention.wk.weight": matrix(keys, dim),
            f"{place}attention.wv.weight": matrix(keys, dim),
            f"{place}attention.wo.weight": matrix(dim, queries),
            f"{place}feed_forward.w1.weight": matrix(hidden, dim),
            f"{place}feed_forward.w2.weight": matrix(dim, hidden),
            f"{place}feed_forward.w3.weight": matrix(hidden, dim),
            f"{place}attention_norm.weight": norm(dim),
            f"{place}ffn_norm.weight": norm(dim),
        }
    vision = of.get("vision_encoder")
    if vision is None:
        return found
    width, patch, merge = vision["hidden_size"], vision["patch_size"], vision.get("spatial_merge_size", 1)
    found |= {
        "vision_encoder.patch_conv.weight": matrix(width, 3, patch, patch, std=0.3),
        "vision_encoder.ln_pre.weight": norm(width),
        "vision_language_adapter.w_in.weight": matrix(dim, width, std=0.3),
        "vision_language_adapter.w_out.weight": matrix(dim, dim, std=0.3),
    }
    if vision["adapter_bias"]:
        found |= {f"vision_language_adapter.{name}.bias": matrix(dim) for name in ("w_in", "w_out")}
    if merge > 1:
        found["pre_mm_projector_norm.weight"] = norm(width)
        found["patch_merger.merging_layer.weight"] = matrix(width, width * merge**2, std=0.3)
    for layer in range(vision["num_hidden_layers"]):
        place = f"vision_encoder.transformer.layers.{layer}."
        found |= {f"{place}attention.w{name}.weight": matrix(width, width, std=0.3) for name in "qkvo"}
        found |= {
            f"{place}feed_forward.w1.weight": matrix(vision["intermediate_size"], width, std=0.3),
            f"{place}feed_forward.w2.weight": matrix(width, vision["intermediate_size"], std=0.3),
            f"{place}feed_forward.w3.weight": matrix(vision["intermediate_size"], width, std=0.3),
            f"{place}attention_norm.weight": norm(width),
            f"{place}ffn_norm.weight": norm(width),
        }
    return found


def make_mistral(
    path: Path, *, merge: int = 1, images: bool = True, version: str = "v3", seed: int = 0, **changed: Any
) -> Path:
    """A directory with Mistral's own three files and nothing else. changed: of params.json."""
    path.mkdir(parents=True)
    own = params(merge=merge, images=images)
    (path / "params.json").write_text(json.dumps(own | changed))
    (path / "tekken.json").write_text(json.dumps(tekken(version=version, merge=merge, images=images)))
    save_file(weights(own, seed), path / "consolidated.safetensors")
    return path
