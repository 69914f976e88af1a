"""The names of the served model: those shown to clients, and those accepted from them."""

from __future__ import annotations

from properties.configuration import Configuration

LMI_DEFAULT = "model"
"""LMI's name for the model in /opt/ml/model, which its clients use in /predictions/model."""

ANYBODYS = ("lmi", "tgi")
"""What clients of LMI and TGI write in `model` when they do not know the model's name."""


def public_names(configuration: Configuration) -> list[str]:
    """Return the names to show to clients; replies use the first. Never a path of this machine."""
    location = configuration.model_location
    own = location.value if location.kind == "hub" else location.name
    return configuration.settings.served_model_name or [own]


def accepted_names(configuration: Configuration) -> frozenset[str]:
    """Return all names that a route such as /predictions/{model} and, with adapters, a request's `model` may have."""
    return frozenset((*public_names(configuration), configuration.model_location.name, LMI_DEFAULT))
