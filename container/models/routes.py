"""The routes that list, load, describe and unload models, as SageMaker's platform and LMI's clients call them."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from handlers.protocols.base import READ, Route
from handlers.protocols.lmi.replies import LmiError

REGISTRY = "registry"
"""The action of these routes."""


class LoadBody(Struct):
    """Loads a model. url: a directory or an archive on this machine. model_name: default: the last part of the url."""

    url: str | None = None
    model_name: str | None = None


class LoadedModel(Struct, forbid_unknown_fields=True, rename="camel"):
    """One model. status: LMI's; IDLE: its next request loads it again."""

    model_name: str
    model_url: str
    status: Literal["PENDING", "READY", "IDLE"]


class LoadedModels(Struct, forbid_unknown_fields=True, rename="camel", omit_defaults=True):
    """A page of models. next_page_token: only if there are more."""

    models: list[LoadedModel]
    next_page_token: str | None = None


class ModelStatus(Struct, forbid_unknown_fields=True):
    """Says what has been done."""

    status: str


ROUTES = (
    Route(
        "/models",
        REGISTRY,
        "The loaded models (SageMaker, LMI)",
        methods=READ,
        query={"limit": "How many at most; 100 at most.", "next_page_token": "Of the page before."},
        replies=(LoadedModels,),
        errors=(LmiError,),
        codes=(400,),
    ),
    Route(
        "/models",
        REGISTRY,
        "Load a model, named in the query or in the body; answered when it can be asked (SageMaker, LMI)",
        query={
            "url": "A directory or a .tar.gz archive on this machine; wins over the body.",
            "model_name": "What requests call it; wins over the body.",
        },
        bodies=(LoadBody,),
        replies=(ModelStatus,),
        errors=(LmiError,),
        codes=(400, 404, 408, 409, 413, 415, 507),
    ),
    Route(
        "/models/{name}",
        REGISTRY,
        "One model (SageMaker)",
        methods=READ,
        template="/models/{model}",
        replies=(LoadedModel,),
        errors=(LmiError,),
        codes=(404,),
    ),
    Route(
        "/models/{name}",
        REGISTRY,
        "Unload a model; answered when its requests have ended and its memory is free (SageMaker, LMI)",
        methods=("DELETE",),
        template="/models/{model}",
        replies=(ModelStatus,),
        errors=(LmiError,),
        codes=(404, 408),
    ),
)
