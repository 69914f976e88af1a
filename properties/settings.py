"""Every option, typed, with its default: the one object that the rest of the program reads."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from properties.field import Option
from properties.settings_chat import ChatSettings
from properties.settings_engine import EngineSettings
from properties.settings_model import ModelSettings
from properties.settings_retired import RetiredSettings
from properties.settings_server import ServerSettings
from properties.settings_vision import VisionSettings

TOPICS: tuple[type[BaseModel], ...] = (
    ModelSettings,
    EngineSettings,
    VisionSettings,
    ChatSettings,
    ServerSettings,
    RetiredSettings,
)
"""The parts of `Settings` in the order of the documentation; each class's docstring is its heading."""


class Settings(RetiredSettings, ServerSettings, ChatSettings, VisionSettings, EngineSettings, ModelSettings):
    """The effective configuration. `Settings()` is all defaults; `resolve` reads the user's sources."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def facts(field: FieldInfo) -> Option:
    """What the schema says about a field beyond its type."""
    return next(item for item in field.metadata if isinstance(item, Option))


def options(topic: type[BaseModel] = Settings) -> Iterator[tuple[str, FieldInfo, Option]]:
    """(attribute name, field, facts) of every option of a topic, or of all, in order."""
    for name, field in topic.model_fields.items():
        yield name, field, facts(field)
