"""Which backend serves a model, and for which reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from handlers.backends.vllm.compat import (
    INSTALL,
    TESTED_ARCHITECTURES,
    TESTED_VERSION,
    check_version,
    installed_version,
)
from handlers.backends.vllm.compat import architectures as vllm_architectures
from handlers.errors import InvalidConfiguration
from properties.configuration import Configuration
from properties.field import BackendName
from properties.problem import ConfigurationError, Problem

if TYPE_CHECKING:
    from handlers.backends.base import Backend

BACKENDS: dict[BackendName, str] = {
    "rolling": "handlers.backends.rolling.backend:RollingBackend",
    "vllm": "handlers.backends.vllm.backend:VllmBackend",
}
"""The module and class of each `Backend`, imported only when it is used."""

RollingBatch = Literal["auto", "vllm", "rolling", "disable"]

_DROPPED_BY_VLLM = {
    "MllamaForConditionalGeneration": "0.10.2",
    "FuyuForCausalLM": "0.25",
    "ChameleonForConditionalGeneration": "0.28",
}
"""For each architecture, the last vLLM version that served it."""

_REMOTE_CODE_IN_VLLM = frozenset({"Phi3VForCausalLM"})
"""Served by vLLM only with the model's own Python code."""


@dataclass(frozen=True)
class Choice:
    """The backend that serves, and the reason, for people."""

    backend: BackendName
    reason: str


def backend_of(name: BackendName) -> Backend:
    """Return the backend of that name; nothing is loaded."""
    module, _, kind = BACKENDS[name].partition(":")
    backend: Backend = getattr(import_module(module), kind)()
    return backend


def vllm_installed() -> bool:
    """Whether vLLM can be imported; it is not imported here."""
    return find_spec("vllm") is not None


def vllm_version_problem() -> str | None:
    """Return why the installed vLLM cannot be driven; None if it can, or if none is installed."""
    try:
        if vllm_installed():
            check_version(installed_version())
    except InvalidConfiguration as error:
        return error.message
    return None


def vllm_backend_present() -> bool:
    """Whether this build has an adapter for vLLM."""
    return find_spec("handlers.backends.vllm") is not None


def choose_for(
    configuration: Configuration, config: Mapping[str, Any], accelerators: int, *, vllm: bool | None = None
) -> Choice:
    """Return what `choose` says of a configuration, which may also ask for vLLM by LMI's own options.

    Such options are only a preference: if vLLM cannot be used, the embedded engine serves, and the reason says so.

    Args:
        configuration: The options.
        config: The model's config.json.
        accelerators: Devices that the process sees.
        vllm: Whether vLLM is installed; None to find out.
    """
    settings = configuration.settings
    choice = choose(
        settings.rolling_batch,
        config.get("architectures") or [],
        accelerators,
        vllm=vllm,
        trust_remote_code=settings.trust_remote_code,
    )
    asked_by = configuration.vllm_asked_by
    if asked_by is None or choice.backend == "vllm":
        return choice
    return replace(choice, reason=f"{asked_by} asks for vLLM, but {choice.reason}")


def choose(
    rolling_batch: RollingBatch,
    architectures: Sequence[str],
    accelerators: int,
    *,
    vllm: bool | None = None,
    adapter: bool | None = None,
    listed: Collection[str] | None = None,
    trust_remote_code: bool = False,
) -> Choice:
    """Apply `option.rolling_batch` to a model and a machine.

    Args:
        rolling_batch: The option.
        architectures: From the model's config.json; empty if it is not known.
        accelerators: Devices that the process sees.
        vllm: Whether vLLM is installed; None to find out.
        adapter: Whether this build can drive vLLM; None to find out.
        listed: The architectures that vLLM lists; None to find out.
        trust_remote_code: Whether the model's own Python code may run.

    Raises:
        ConfigurationError: vLLM is demanded and cannot serve.
    """
    installed = vllm_installed() if vllm is None else vllm
    present = vllm_backend_present() if adapter is None else adapter
    if listed is None:
        listed = vllm_architectures() if installed else ()
    refusal = _refusal(architectures, installed, present, trust_remote_code, listed)
    if vllm is None and refusal is None:
        refusal = vllm_version_problem()
    if rolling_batch == "vllm":
        if refusal is not None:
            raise ConfigurationError(
                [Problem(f"option.rolling_batch = 'vllm': {refusal}; use rolling or auto", "rolling_batch")]
            )
        return Choice("vllm", "option.rolling_batch says so")
    if rolling_batch == "rolling":
        return Choice("rolling", "option.rolling_batch says so")
    if rolling_batch == "disable":
        return Choice("rolling", "option.rolling_batch = disable: the embedded engine, one request at a time")
    if refusal is not None:
        return Choice("rolling", refusal)
    if accelerators == 0:
        return Choice("rolling", "no accelerator is visible")
    if listed and architectures and not set(architectures) & set(listed):
        return Choice("rolling", f"the installed vLLM does not list {', '.join(architectures)}")
    return Choice("vllm", "vLLM is installed, sees an accelerator and serves the model")


def remedy(architectures: Sequence[str], *, vllm: bool | None = None) -> str:
    """Return what to do about a model that the embedded engine does not serve, with the arguments of `choose`."""
    installed = vllm_installed() if vllm is None else vllm
    listed = vllm_architectures() if installed else TESTED_ARCHITECTURES
    for name in architectures:
        if name in _DROPPED_BY_VLLM and name not in listed:
            return (
                f"vLLM {_DROPPED_BY_VLLM[name]} was the last to serve {name}: serve a model of another family"
            )
        if name in listed:
            how = "set" if installed else f"{INSTALL} and set"
            code = " and option.trust_remote_code=true" if name in _REMOTE_CODE_IN_VLLM else ""
            return f"vLLM serves {name}: {how} option.rolling_batch=vllm{code}"
    theirs = "the installed vLLM" if installed else f"vLLM {TESTED_VERSION}"
    named = ", ".join(architectures) or "a config.json without architectures"
    return f"{theirs} does not list {named} either: serve a model of a family that is served"


def _refusal(
    architectures: Sequence[str],
    installed: bool,
    present: bool,
    remote_code: bool,
    listed: Collection[str],
) -> str | None:
    """Return why vLLM cannot serve; None if it can."""
    if not present:
        return "this build has no vLLM backend"
    if not installed:
        return "vLLM is not installed"
    for name in architectures:
        if name in _DROPPED_BY_VLLM and name not in listed:
            return f"vLLM {_DROPPED_BY_VLLM[name]} was the last to serve {name}"
        if name in _REMOTE_CODE_IN_VLLM and not remote_code:
            return f"vLLM serves {name} only with option.trust_remote_code=true"
    return None
