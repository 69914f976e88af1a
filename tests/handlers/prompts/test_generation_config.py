"""A model's generation_config.json: which of its fields are defaults here, and where they stand in the order."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from handlers.backends.rolling.model_front import ModelFront
from handlers.backends.vllm.sampling import Samplers, usual_sampling
from handlers.prompts.generation_config import read_default_sampling
from handlers.protocols.base import ServerContext, Task
from handlers.protocols.lmi.requests import read_lmi
from handlers.protocols.openai.chat import read_chat
from handlers.protocols.openai.completions import read_completion
from handlers.protocols.tgi.requests import read_tgi
from handlers.request import RequestSampling
from handlers.request_checks import checked_sampling, checked_tokens
from properties.settings import Settings
from tests.support.models import make_text_model
from tests.support.scripted import chat, incoming

OBEYED: dict[str, Any] = {
    "temperature": 0.6, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.05,
    "presence_penalty": 0.5, "frequency_penalty": -0.5, "max_new_tokens": 9,
}  # fmt: skip
TOLD: dict[str, Any] = {
    "min_length": 5, "min_new_tokens": 5, "stop_strings": ["x"], "num_beams": 4, "penalty_alpha": 0.6,
    "dola_layers": "low", "top_h": 0.4, "epsilon_cutoff": 3e-4, "eta_cutoff": 3e-4, "no_repeat_ngram_size": 3,
    "encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 3, "bad_words_ids": [[5]],
    "suppress_tokens": [5], "begin_suppress_tokens": [5], "sequence_bias": [[[5], -1.0]],
    "exponential_decay_length_penalty": [5, 1.1], "guidance_scale": 1.5,
    "watermarking_config": {"bias": 2.5}, "forced_bos_token_id": 0, "forced_eos_token_id": 1,
    "diversity_penalty": 0.5, "force_words_ids": [[5]], "constraints": ["x"], "max_time": 1.0,
    "renormalize_logits": True,
}  # fmt: skip
ELSEWHERE = {"do_sample", "eos_token_id"}
WITHOUT_EFFECT = {
    # the context is the longest answer, as in vLLM
    "max_length",
    # prompts are taken as they are
    "token_healing",
    # tokenizer and model say it
    "bos_token_id", "pad_token_id", "decoder_start_token_id",
    # only where beams are searched, or several answers made of one prompt
    "early_stopping", "length_penalty", "num_beam_groups", "num_return_sequences",
    # how fast, and with how much memory
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory", "compile_config",
    "disable_compile", "continuous_batching_config", "prefill_chunk_size", "use_mtp", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
    "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
    # numerical guards that this sampler does not need
    "remove_invalid_values",
    # what `generate` returns
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "transformers_version", "_from_model_config",
}  # fmt: skip

ALL = ServerContext("shapes", {"temperature": 0.6, "max_tokens": 9}, max_model_len=64)


def test_every_field_is_a_default_or_told_or_without_effect_on_purpose() -> None:
    """A new version of transformers that knows another field fails here; vLLM adds two."""
    known = {*OBEYED, *TOLD, *ELSEWHERE, *WITHOUT_EFFECT}
    assert GenerationConfig().to_dict().keys() | {"presence_penalty", "frequency_penalty"} <= known


def test_what_it_says_is_the_default(caplog: pytest.LogCaptureFixture) -> None:
    want = {**OBEYED, "max_tokens": OBEYED["max_new_tokens"]}
    del want["max_new_tokens"]
    assert read_default_sampling(OBEYED) == want
    assert read_default_sampling({**OBEYED, "do_sample": True}) == want
    greedy = {name: want[name] for name in want if name.endswith("penalty") or name == "max_tokens"}
    assert read_default_sampling({**OBEYED, "do_sample": False}) == {**greedy, "temperature": 0.0}
    assert read_default_sampling({"max_new_tokens": 9.0, "top_k": None}) == {"max_tokens": 9}
    assert read_default_sampling({"max_new_tokens": 10**12}) == {}, "to the end of the context"
    assert read_default_sampling({}) == {}
    assert not caplog.messages


def test_what_has_no_effect_is_told_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    assert read_default_sampling(TOLD) == {}
    (told,) = caplog.messages
    assert set(told.rpartition(": ")[2].split(", ")) == TOLD.keys()
    caplog.clear()
    neutral = {
        "num_beams": 1,
        "guidance_scale": 1.0,
        "no_repeat_ngram_size": 0,
        "stop_strings": None,
        "renormalize_logits": False,
        "diversity_penalty": 0.0,
        "forced_eos_token_id": None,
    }
    assert read_default_sampling({**neutral, "suppress_tokens": [], "max_length": 4096}) == {}
    assert not caplog.messages


@pytest.mark.parametrize(
    "bad",
    [
        {"top_p": 0}, {"top_p": 1.5}, {"temperature": -1}, {"temperature": "hot"}, {"top_k": 2.5}, {"top_k": True},
        {"max_new_tokens": 0}, {"max_new_tokens": -1}, {"repetition_penalty": []},
    ],
)  # fmt: skip
def test_a_value_that_every_request_would_fail_by_is_left_out_and_told(
    bad: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert read_default_sampling({**bad, "min_p": 0.1}) == {"min_p": 0.1}
    (told,) = caplog.messages
    assert told.startswith(f"generation_config.json: {next(iter(bad))} = ")
    assert caplog.records[0].levelno == logging.WARNING


def test_vllm_without_our_samplers_is_not_asked_for_them_by_default() -> None:
    defaults = {"typical_p": 0.9, "top_p": 0.8}
    assert usual_sampling(defaults, Samplers()) == defaults
    assert usual_sampling(defaults, Samplers(lacking="0.28")) == {"top_p": 0.8}


def completion(**fields: Any) -> Task:
    return read_completion({"prompt": "a", **fields}, ALL, incoming({}))


def lmi(**parameters: Any) -> Task:
    return read_lmi({"inputs": "a", "parameters": parameters}, ALL, incoming({}))


@pytest.mark.parametrize(
    ("task", "tokens", "default"),
    [
        (read_chat(chat(), ALL, incoming({})), 9, True),
        (read_chat(chat(max_tokens=None, max_completion_tokens=None), ALL, incoming({})), 9, True),
        (read_chat(chat(max_tokens=20), ALL, incoming({})), 20, False),
        (read_chat(chat(max_completion_tokens=20), ALL, incoming({})), 20, False),
        (read_chat(chat(), ServerContext("shapes"), incoming({})), None, False),
        # OpenAI's own default comes first, as in vLLM; null asks for the model's.
        (completion(), 16, True),
        (completion(max_tokens=None), 9, True),
        (completion(max_tokens=20), 20, False),
        # LMI documents 30; TGI's router knows no defaults of the model's.
        (lmi(), 30, True),
        (lmi(max_new_tokens=20), 20, False),
        (read_tgi({"inputs": "a"}, ALL, incoming({}, "/generate")), None, True),
    ],
)
def test_the_length_of_an_answer_is_the_clients_then_the_apis_then_the_models(
    task: Task, tokens: int | None, default: bool
) -> None:
    (request,) = task.requests
    assert (request.sampling.max_tokens, request.max_tokens_is_default) == (tokens, default)


def test_the_models_default_never_refuses_a_prompt_or_takes_its_room() -> None:
    (request,) = read_chat(chat(), ServerContext("shapes", {"max_tokens": 500}), incoming({})).requests
    assert checked_sampling(request, 60, 64, 300) == RequestSampling(max_tokens=4)
    request.truncate_prompt_tokens = -1
    assert len(checked_tokens(request, [1] * 100, 64, 300)) == 32


def test_a_served_model_has_its_defaults(tmp_path: Path) -> None:
    path = make_text_model(tmp_path)
    (path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 9, "eos_token_id": 257}))
    text = ModelFront.load(Settings(), str(path)).text
    assert (text.default_sampling, text.eos_token_ids) == ({"max_tokens": 9}, (257,))
