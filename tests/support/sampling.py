"""Settings of every rarer sampler, and logits to try them on."""

from __future__ import annotations

from typing import Any

import torch

EOS = 2


def random_logits(rows: int, vocab_size: int = 300, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


KINDS: list[dict[str, Any]] = [
    {"top_a": 0.3},
    {"tfs": 0.9, "temperature": 1.5},
    {"eta_cutoff": 30.0},
    {"epsilon_cutoff": 12.0},
    {"smoothing_factor": 0.2, "smoothing_curve": 1.5},
    {"dynatemp_min": 0.4, "dynatemp_max": 1.8},
    {"xtc_probability": 0.5, "xtc_threshold": 0.03},
    {"nsigma": 1.2, "temperature": 2.0},
    {"dry_multiplier": 0.8},
    {"mirostat_mode": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.3},
    {"no_repeat_ngram_size": 2},
    {"skew": 0.5},
    {"allowed_token_ids": tuple(range(0, 300, 3))},
    {"bad_words_token_ids": ((1,), (3, 4))},
    {
        "temperature_last": True,
        "temperature": 1.7,
        "top_p": 0.8,
        "top_k": 30,
        "min_p": 0.01,
        "typical_p": 0.9,
    },
    {"sampler_priority": (7, 6, 8, 13, 12, 5, 0, 1, 2, 3, 4, 9, 10, 11), "top_p": 0.9, "tfs": 0.95},
    {"temperature": 0.0, "dry_multiplier": 1.0, "no_repeat_ngram_size": 3},
    {"temperature": 0.8},
    {"temperature": 0.0},
]
