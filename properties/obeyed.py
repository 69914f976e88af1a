"""What was written and will not be done, whichever backend serves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from properties.field import Level
from properties.location import ModelLocation
from properties.names import key_of
from properties.problem import Problem, Source
from properties.resolution import Resolution
from properties.settings import Settings

DEFAULTS = Settings()


def changed(settings: Settings, sources: Mapping[str, Source], name: str) -> bool:
    """Whether somebody wrote another value than the default."""
    written = sources[name].level < Level.RECOMMENDED
    return written and getattr(settings, name) != getattr(DEFAULTS, name)


def not_obeyed(result: Resolution, location: ModelLocation | None, home: Path | None) -> list[Problem]:
    """A warning for each. location: None where it is not known."""
    settings, sources = result.settings, result.sources
    reasons: dict[str, str] = {}
    counts = settings.limit_mm_per_prompt
    asked = [name for name, count in counts.items() if name != "image" and count > 0]
    if asked:
        reasons["limit_mm_per_prompt"] = f"allows {' and '.join(asked)}, which is not served: only images are"
    others = sorted(set(settings.media_io_kwargs or {}) - {"image"})
    if others:
        reasons["media_io_kwargs"] = (
            f"says how to read {' and '.join(others)}, which is not served: only images are"
        )
    if location is not None and location.kind != "hub":
        reasons["revision"] = "has no effect: only models of the hub have revisions"
    if location is not None and location.kind != "s3":
        reasons["download_dir"] = "has no effect: only models from s3:// are kept there"
    unseen = location is None or (location.kind == "s3" and home is None)
    if settings.entry_point is None and not unseen and not (home and (home / "model.py").is_file()):
        reasons["handler"] = "has no effect: the model has no model.py, and no entry point is named"
    return [
        Problem(f"{key_of(name)} ({sources[name].location}) {reason}", name, sources[name])
        for name, reason in reasons.items()
        if changed(settings, sources, name)
    ]
