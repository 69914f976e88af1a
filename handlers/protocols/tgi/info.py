"""TGI's `/info`: what is served and within which limits, today's keys and those of earlier versions."""

from __future__ import annotations

import msgspec

from engine.sampling_params import MAX_STOP_STRINGS
from handlers.backends.base import Capabilities
from handlers.protocols.base import MAX_PROMPTS
from handlers.protocols.openai.fields import MAX_ANSWERS
from handlers.version import VERSION


def tgi_info(
    model_name: str, capabilities: Capabilities, *, concurrent_requests: int, batch_size: int
) -> bytes:
    """concurrent_requests: answers that may be in flight. batch_size: most that share a step.

    `router` names the protocol, by which clients know what they talk to. A prompt that waits joins the next step:
    hence the zeros.
    """
    longest = capabilities.max_model_len
    return msgspec.json.encode(
        {
            "model_id": model_name,
            "model_sha": None,
            "model_pipeline_tag": "image-text-to-text" if capabilities.images else "text-generation",
            "max_concurrent_requests": concurrent_requests,
            "max_best_of": MAX_ANSWERS,
            "max_stop_sequences": MAX_STOP_STRINGS,
            "max_input_tokens": longest - 1,
            "max_total_tokens": longest,
            "validation_workers": capabilities.prompt_threads,
            "max_client_batch_size": MAX_PROMPTS,
            "router": "text-generation-router",
            "version": VERSION,
            "sha": None,
            "docker_label": None,
            "model_dtype": capabilities.dtype or None,
            "model_device_type": capabilities.device_type or None,
            "max_input_length": longest - 1,
            "waiting_served_ratio": 0.0,
            "max_batch_total_tokens": capabilities.cache_tokens or None,
            "max_waiting_tokens": 0,
            "max_batch_size": batch_size,
        }
    )
