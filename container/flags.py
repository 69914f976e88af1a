"""Options of the configuration as flags of their own: `--max-model-len 4096` for `--option max_model_len=4096`.

The spellings are those of vLLM and Aphrodite: dashes or underscores, `--flag=value`, switches without a value, `--no-`
before a switch, `--flag.key value` for one entry of a JSON object, several values after one flag.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from properties.field import Level
from properties.lmi import RENAMED, ignored_because
from properties.names import KEYS, OPTIONS, PREFIX, key_from_command_line, nearest
from properties.settings import Settings
from properties.sources import SAME, VLLM_WITHOUT, WITHOUT_EFFECT
from properties.vllm_arguments import VLLM_ABSENT, VLLM_ARGUMENTS

SHORT = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-q": "--quantization"}

_SEVERAL = frozenset(
    {
        "served_model_name",
        "api_key",
        "limit_mm_per_prompt",
        "allowed_media_domains",
        "image_fetch_allow_private",
    }
)


class FlagError(ValueError):
    """A flag that is not known or lacks its value; the message names it and the most similar known flag."""


@dataclass(slots=True)
class Flags:
    """The options found on a command line.

    Attributes:
        rest: The other arguments, in order.
        options: "--flag=value" for `properties.sources`.
        secret: The same for options whose values must not be shown.
        warnings: Sentences for the user.
    """

    rest: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    secret: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_flags(arguments: Sequence[str], own: Collection[str], more: Collection[str] = ()) -> Flags:
    """Extract the options from a command line.

    A flag takes several values only after the model's name: before it, the last value could be the model.

    Args:
        arguments: The command line.
        own: Flags that are not options and stay in `rest`; only `--instance` among them has a value. `--option` stays
            there with its value, too.
        more: Options that are known in addition to the schema's.

    Raises:
        FlagError: A flag is not known or lacks its value.
    """
    reader = _Reader(arguments, more)
    while reader.waiting:
        reader.read(own)
    return reader.finish()


class _Reader:
    def __init__(self, arguments: Sequence[str], more: Collection[str]) -> None:
        self.waiting = deque(arguments)
        self._more = more
        self._found = Flags()
        self._entries: dict[str, dict[str, object]] = {}
        self._named = False

    def read(self, own: Collection[str]) -> None:
        argument = self.waiting.popleft()
        flag, equals, value = argument.partition("=")
        flag = SHORT.get(flag, flag)
        if argument == "--":
            self._found.rest += [argument, *self.waiting]
            self.waiting.clear()
        elif flag == "--option":
            self._option(value if equals else self._next("--option"))
        elif flag == "--instance" and flag in own:
            self._found.rest += [flag, value if equals else self._next(flag)]
        elif flag in own or not flag.startswith("--"):
            self._found.rest.append(argument)
            self._named |= not argument.startswith("-")
        else:
            self._flag(flag, value if equals else None)

    def finish(self) -> Flags:
        for name, entries in self._entries.items():
            self._found.options.append(f"--{name.replace('_', '-')}={json.dumps(entries)}")
        return self._found

    def _option(self, text: str) -> None:
        attribute = _attribute(text.partition("=")[0].strip())
        if attribute is not None and OPTIONS[attribute].secret:
            self._found.secret.append(text)
        else:
            self._found.rest += ["--option", text]

    def _flag(self, flag: str, value: str | None) -> None:
        """Read one flag. value: what follows it after an equals sign."""
        base, _, entry = flag.removeprefix("--").partition(".")
        name = base.replace("-", "_")
        name = SAME.get(name, name)
        if name in WITHOUT_EFFECT:
            if value is None and WITHOUT_EFFECT[name]:
                self._next(flag)
            self._found.warnings.append(f"{flag} has no effect here")
            return
        positive = name.removeprefix("no_")
        if value is None and positive != name and not self._known(name) and self._is_switch(positive):
            self._add(positive, "false")
            return
        if not self._known(name):
            raise FlagError(f"unknown flag {flag}; {self._hint(name)}")
        if entry:
            given = self._next(flag) if value is None else value
            _put(self._entries.setdefault(name, {}), entry.split("."), given)
            return
        self._add(name, self._value(flag, name) if value is None else value)
        self._named |= name == "model_id"

    def _hint(self, name: str) -> str:
        """Return what to do about a flag that is not known."""
        if (instead := VLLM_WITHOUT.get(name)) is not None:
            return instead
        if name in VLLM_ARGUMENTS and not self._more:
            return f"it is a flag of {VLLM_ABSENT}"
        near = nearest(PREFIX + name, Level.COMMAND_LINE, self._more)
        return f"did you mean --{near.replace('_', '-')}?" if near else "docs/configuration.md lists all flags"

    def _value(self, flag: str, name: str) -> str:
        """Return the arguments after a flag that are its value."""
        attribute = _attribute(name)
        if self._is_switch(name):
            return self.waiting.popleft() if self.waiting and self.waiting[0].lower() in _SWITCH else "true"
        if attribute is None:  # an option of a backend, whose type is not known here
            return self.waiting.popleft() if self.waiting and self.waiting[0][:2] != "--" else "true"
        values = [self._next(flag)]
        while self._named and attribute in _SEVERAL and self.waiting and self.waiting[0][:1] != "-":
            values.append(self.waiting.popleft())
        if len(values) == 1:
            return values[0]
        return ",".join(values) if attribute == "limit_mm_per_prompt" else json.dumps(values)

    def _next(self, flag: str) -> str:
        if not self.waiting or self.waiting[0].startswith("--"):
            raise FlagError(f"{flag} needs a value")
        return self.waiting.popleft()

    def _add(self, name: str, value: str) -> None:
        attribute = _attribute(name)
        if attribute == "chat_template":
            value = _from_here(value)
        secret = attribute is not None and OPTIONS[attribute].secret
        (self._found.secret if secret else self._found.options).append(f"--{name.replace('_', '-')}={value}")

    def _known(self, name: str) -> bool:
        return (
            _attribute(name) is not None
            or name in self._more
            or ignored_because(key_from_command_line(name)) is not None
        )

    def _is_switch(self, name: str) -> bool:
        attribute = _attribute(name)
        return attribute is not None and Settings.model_fields[attribute].annotation is bool


_SWITCH = ("true", "false")


def _attribute(name: str) -> str | None:
    key = key_from_command_line(name)
    return KEYS.get(RENAMED.get(key, key))


def _from_here(template: str) -> str:
    """Return a file's name from a command line, relative to the working directory rather than the model's."""
    try:
        return str(Path(template).resolve()) if os.path.isfile(template) else template
    except ValueError:
        return template


def _put(entries: dict[str, object], path: Sequence[str], text: str) -> None:
    """Set one entry of nested objects; its value is JSON, or else a string."""
    *parents, last = path
    for parent in parents:
        inner = entries.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise FlagError(f"the entry {parent!r} is given both a value and entries of its own")
        entries = inner
    try:
        entries[last] = json.loads(text)
    except ValueError:
        entries[last] = text
