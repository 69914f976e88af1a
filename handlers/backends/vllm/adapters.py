"""LoRA adapters that lie beside the model: found at the start, loaded into the engine, chosen by name."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from handlers.backends.vllm.compat import Vllm
from handlers.errors import InvalidConfiguration, NotFound

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[\w][\w.-]{0,127}", re.ASCII)
_CONFIG = "adapter_config.json"


def adapter_directories(home: Path) -> dict[str, Path]:
    """Name -> directory, of each `adapters/<name>/` that holds an adapter. Raises InvalidConfiguration."""
    found: dict[str, Path] = {}
    place = home / "adapters"
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        if not path.is_dir() or path.name.startswith("."):
            continue
        if not (path / _CONFIG).is_file():
            raise InvalidConfiguration(f"adapters/{path.name} holds no {_CONFIG}: it is not a LoRA adapter")
        if not _NAME.fullmatch(path.name):
            raise InvalidConfiguration(
                f"adapters/{path.name[:80]}: allowed in an adapter's name: letters, digits, `_`, `.` and `-`"
            )
        if (path / "model.py").is_file():
            logger.warning(
                "adapters/%s/model.py is not used: handlers and formatters are the model's alone", path.name
            )
        found[path.name] = path
    return found


def spare_place(arguments: Mapping[str, Any], adapters: int) -> dict[str, int]:
    """vLLM's arguments with one place more than there are adapters, for a CPU.

    Its kernels there give requests without an adapter what is in the last place, which must stay empty.
    """
    places = max(int(arguments["max_loras"]), adapters) + 1
    return {"max_loras": places, "max_cpu_loras": max(int(arguments.get("max_cpu_loras") or 0), places)}


class Adapters:
    """The adapters that requests may name; each has vLLM's own number for as long as the server lives."""

    def __init__(self, vllm: Vllm, directories: dict[str, Path]) -> None:
        self._known = {
            name: vllm.LoRARequest(name, number, str(path))
            for number, (name, path) in enumerate(directories.items(), 1)
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def chosen(self, adapter: str | None, model: str | None) -> Any:
        """vLLM's LoRARequest for the adapter that a request names, else for a model that is called like one.

        None for the model itself. Raises NotFound, which does not tell the others' names.
        """
        if adapter is None:
            return self._known.get(model or "")
        if adapter not in self._known:
            raise NotFound(f"there is no adapter {adapter[:80]!r}", param="adapters")
        return self._known[adapter]

    async def load(self, engine: Any) -> None:
        """Have the engine load each once, so that a bad one is told now. Raises InvalidConfiguration."""
        for name, request in self._known.items():
            try:
                loaded = await engine.add_lora(request)
            except Exception as error:
                reason = str(error.__cause__ or error).strip().splitlines()
                told = reason[-1][:300] if reason else type(error).__name__
                raise InvalidConfiguration(f"the adapter {name} cannot be loaded: {told}") from error
            if not loaded:
                raise InvalidConfiguration(f"the adapter {name} cannot be loaded; the engine's log says why")
            logger.info("adapter %s is loaded", name)
