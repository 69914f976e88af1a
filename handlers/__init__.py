"""One request's way from payload to reply; and the same models in scripts, with `from handlers import LLM`.

The names for scripts are imported when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from handlers.offline.images import ImageFeatureData, ImagePixelData, MultiModalData
    from handlers.offline.llm import LLM
    from handlers.offline.outputs import CompletionOutput, Logprob, RequestOutput
    from handlers.offline.params import GuidedDecodingParams, SamplingParams, StructuredOutputsParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "GuidedDecodingParams",
    "ImageFeatureData",
    "ImagePixelData",
    "Logprob",
    "MultiModalData",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
]

_FROM = {
    "LLM": "llm",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "RequestOutput": "outputs",
    "ImageFeatureData": "images",
    "ImagePixelData": "images",
    "MultiModalData": "images",
    "GuidedDecodingParams": "params",
    "SamplingParams": "params",
    "StructuredOutputsParams": "params",
}


def __getattr__(name: str) -> object:
    if name not in _FROM:
        raise AttributeError(f"module 'handlers' has no attribute {name!r}")
    return getattr(import_module(f"handlers.offline.{_FROM[name]}"), name)
