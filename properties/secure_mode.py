"""SageMaker's secure mode: what its platform forbids a container whose model comes from a third party.

The platform sets three variables: `SAGEMAKER_SECURE_MODE=true`, `SAGEMAKER_SECURITY_CONTROLS` (what is forbidden) and
`SAGEMAKER_UNTRUSTED_CHANNELS` (the directories that hold the model's files). The names are those of LMI.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from properties.model import SCRIPTS
from properties.problem import Problem, Source
from properties.settings import Settings

SECURE_MODE = "SAGEMAKER_SECURE_MODE"
_CONTROLS = "SAGEMAKER_SECURITY_CONTROLS"
_CHANNELS = "SAGEMAKER_UNTRUSTED_CHANNELS"

_REQUIREMENTS = "DISALLOW_REQUIREMENTS_TXT"
_PICKLES = "DISALLOW_PICKLE_FILES"
_REMOTE_CODE = "DISALLOW_TRUST_REMOTE_CODE"
_SCRIPTS = "DISALLOW_CUSTOM_INFERENCE_SCRIPTS"
_TEMPLATES = "DISALLOW_CHAT_TEMPLATE"
_KNOWN = (_REQUIREMENTS, _PICKLES, _REMOTE_CODE, _SCRIPTS, _TEMPLATES)

_DRAFTING = frozenset({"method", "num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max"})
"""Fields of speculative_config that need no files but the model's own."""

_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl)", re.IGNORECASE)
_MOST_FILES = 100_000
_TEMPLATE_ENTRIES = ("tokenizer_config.json", "processor_config.json")
_TEMPLATE_FILES = re.compile(r"chat_template\.json|.*\.jinja", re.IGNORECASE)


@dataclass(frozen=True)
class SecureMode:
    """What is forbidden, and where. controls: empty where nothing is. channels: directories to search."""

    controls: frozenset[str] = frozenset()
    channels: tuple[Path, ...] = ()

    def options(
        self, settings: Settings, sources: Mapping[str, Source], extra: Mapping[str, Source], handler: str | None
    ) -> Iterator[Problem]:
        """Yield each option that is forbidden.

        extra: Names that are no options of this server -> where they come from. They would reach vLLM, and some of its
        arguments name code; so all are forbidden, as in LMI. handler: see `Configuration.lmi_handler`.
        """
        if not self.controls:
            return
        for name, source in extra.items():
            yield Problem(f"option.{name} ({source.location}) is forbidden by {SECURE_MODE}: it is not known", name)
        drafts_alone = set(settings.speculative_config or ()) <= _DRAFTING
        forbidden = (
            (None, "speculative_config", not drafts_alone),
            (None, "kv_transfer_config", settings.kv_transfer_config),
            (_REMOTE_CODE, "trust_remote_code", settings.trust_remote_code),
            (_SCRIPTS, "entry_point", settings.entry_point is not None and handler is None),
            (_REQUIREMENTS, "install_requirements", settings.install_requirements),
            (_PICKLES, "load_format", settings.load_format not in ("auto", "safetensors")),
            (_TEMPLATES, "chat_template", settings.chat_template is not None),
            (_TEMPLATES, "trust_request_chat_template", settings.trust_request_chat_template),
        )
        for control, name, used in forbidden:
            if used and (control is None or control in self.controls):
                where = f"{name} ({sources[name].location})"
                by = SECURE_MODE if control is None else f"{control} of {_CONTROLS}"
                yield Problem(f"{where} is forbidden by {by}", name)

    def files(self, directory: Path | None) -> Iterator[Problem]:
        """Yield what is forbidden in the directory of a model or adapter, and in all that it contains."""
        if directory is None or not self.controls:
            return
        if _SCRIPTS in self.controls:
            for name in SCRIPTS:
                if (directory / name).is_file():
                    yield _file(directory / name, _SCRIPTS)
        yield from self._searched(directory)

    def channel_files(self) -> Iterator[Problem]:
        """Yield what is forbidden in the untrusted channels."""
        for channel in self.channels:
            if not channel.is_dir():
                yield Problem(f"{_CHANNELS}: {channel} is not a directory")
            yield from self._searched(channel)

    def _searched(self, directory: Path) -> Iterator[Problem]:
        count = 0
        for folder, _, names in os.walk(directory):
            count += len(names)
            if count > _MOST_FILES:
                yield Problem(f"{directory} has more than {_MOST_FILES} files: {SECURE_MODE} cannot check them")
                return
            for name in sorted(names):
                path = Path(folder, name)
                # It is forbidden in any folder: it is installed from the one that contains the entry point.
                if _REQUIREMENTS in self.controls and name == "requirements.txt":
                    yield _file(path, _REQUIREMENTS)
                if _PICKLES in self.controls and _PICKLE.fullmatch(name):
                    yield _file(path, _PICKLES)
                if _TEMPLATES in self.controls and _brings_template(path):
                    yield _file(path, _TEMPLATES)


OPEN = SecureMode()
"""Without secure mode: nothing is forbidden."""


def secure_mode(environ: Mapping[str, str], problems: list[Problem]) -> SecureMode:
    """Read the platform's variables. What is wrong with them goes to `problems`: a typo must not allow anything."""
    if environ.get(SECURE_MODE, "").strip().lower() != "true":
        return OPEN
    controls = _listed(environ.get(_CONTROLS, ""))
    if not controls:
        problems.append(Problem(f"{SECURE_MODE} = 'true' needs {_CONTROLS}; allowed: {', '.join(_KNOWN)}"))
    for control in controls:
        if control not in _KNOWN:
            problems.append(Problem(f"{_CONTROLS}: {control!r} is not known; allowed: {', '.join(_KNOWN)}"))
    return SecureMode(frozenset(controls), tuple(map(Path, _listed(environ.get(_CHANNELS, "")))))


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _file(path: Path, control: str) -> Problem:
    return Problem(f"{path} is forbidden by {control} of {_CONTROLS}: remove it")


def _brings_template(path: Path) -> bool:
    if path.name not in _TEMPLATE_ENTRIES:
        return _TEMPLATE_FILES.fullmatch(path.name) is not None
    try:
        entries = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return True  # a file that cannot be read is not allowed either
    return not isinstance(entries, dict) or "chat_template" in entries
