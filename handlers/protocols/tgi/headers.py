"""What TGI's replies say of themselves in headers, by which its users bill and measure."""

from __future__ import annotations

from collections.abc import Sequence

from handlers.exchange import RequestFacts
from handlers.request import GenerationRequest, TextPart, prompt_parts

ROUTES = frozenset({"/", "/generate", "/generate_stream", "/v1/chat/completions", "/v1/completions"})
"""The routes that TGI has, too."""

_AROUND_A_PICTURE = len("![]()")


def of_stream(requests: Sequence[GenerationRequest], compute_type: str) -> dict[str, str]:
    """They are sent with the first token: nothing of a stream's times is known by then."""
    return {
        "x-compute-type": compute_type or "unknown",
        "x-compute-characters": str(sum(map(_characters, requests))),
        "x-accel-buffering": "no",
    }


def of_whole(requests: Sequence[GenerationRequest], compute_type: str, facts: RequestFacts) -> dict[str, str]:
    """facts: complete. Times are whole milliseconds, but for the first, which is seconds.

    Validation ends when the engine has the prompt, inference begins with its first step.
    """
    total = facts.total or 0.0
    inference = max(0.0, total - facts.prepared - facts.queued)
    return {
        "x-compute-type": compute_type or "unknown",
        "x-compute-time": f"{total:.6f}",
        "x-compute-characters": str(sum(map(_characters, requests))),
        "x-total-time": _milliseconds(total),
        "x-validation-time": _milliseconds(facts.prepared),
        "x-queue-time": _milliseconds(facts.queued),
        "x-inference-time": _milliseconds(inference),
        "x-time-per-token": _milliseconds(inference / max(1, facts.completion_tokens)),
        "x-prompt-tokens": str(facts.prompt_tokens),
        "x-generated-tokens": str(facts.completion_tokens),
    }


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))


def _characters(request: GenerationRequest) -> int:
    """Of the prompt as it is written, pictures included."""
    return sum(
        len(part.text) if isinstance(part, TextPart) else part.characters + _AROUND_A_PICTURE
        for part in prompt_parts(request.prompt)
    )
