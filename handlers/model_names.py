"""What the served model is called, and what it may be called by."""

from __future__ import annotations

from properties.configuration import Configuration

LMI_DEFAULT = "model"
"""LMI's name for the model in /opt/ml/model: its clients ask /predictions/model."""

ANYBODYS = ("lmi", "tgi")
"""What clients of LMI and TGI call any model in `model` when they are told no name."""


def public_names(configuration: Configuration) -> list[str]:
    """The names to show to clients, the first one in replies. Never a path of this machine."""
    location = configuration.model_location
    own = location.value if location.kind == "hub" else location.name
    return configuration.settings.served_model_name or [own]


def accepted_names(configuration: Configuration) -> frozenset[str]:
    """All names that a route such as /predictions/{model} may hold, and with adapters a request's `model`."""
    return frozenset((*public_names(configuration), configuration.model_location.name, LMI_DEFAULT))
