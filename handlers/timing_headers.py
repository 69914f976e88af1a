"""TGI's headers of counts and times, which its routes and OpenAI's have (`Route.timed`)."""

from __future__ import annotations

from collections.abc import Sequence

from handlers.request import GenerationRequest, RequestFacts, TextPart, prompt_parts

_AROUND_AN_IMAGE = len("![]()")


def timing_headers(requests: Sequence[GenerationRequest], compute_type: str, facts: RequestFacts) -> dict[str, str]:
    """Return the headers of a reply. Times are whole milliseconds; only `x-compute-time` is in seconds.

    Validation ends when the engine has the prompt, and inference begins with its first step. A stream's headers are
    sent with its first token, when its times are not known yet.
    """
    own = {"x-compute-type": compute_type or "unknown", "x-compute-characters": str(sum(map(_characters, requests)))}
    if facts.stream:
        return {**own, "x-accel-buffering": "no"}
    total = facts.total or 0.0
    inference = max(0.0, total - facts.prepared - facts.queued)
    return {
        **own,
        "x-compute-time": f"{total:.6f}",
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
    """Return the number of characters of the prompt as it was sent, images included."""
    return sum(
        len(part.text) if isinstance(part, TextPart) else part.characters + _AROUND_AN_IMAGE
        for part in prompt_parts(request.prompt)
    )
