"""What is wrong with a model, judged by its files without loading it: `lmi check` reports it and a start is refused.

Neither torch nor transformers is imported here; what only they can tell, `model_front` finds out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import msgspec

from engine.errors import ModelLoadError
from handlers.artefacts.tekken import TEKKEN, VERSIONS
from handlers.backends.backend import Backend, Findings
from handlers.backends.mistral_format import format_problems
from handlers.backends.weight_files import unreadable
from handlers.prompts.chat_templates import ChatTemplates, TemplateSource, read_chat_templates
from properties.configuration import read_model_config
from properties.model import read_object
from properties.names import key_of
from properties.problem import ConfigurationError, Problem

if TYPE_CHECKING:
    from properties.configuration import Configuration
    from properties.settings import Settings

_JSON = (
    "tokenizer_config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "tokenizer.json",
)
"""Files that contain a JSON object, if they exist."""

_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "*.bpe", "tekken.json")
"""Files from which a tokenizer can be made."""


def model_findings(configuration: Configuration, directory: Path, backend: Backend) -> Findings:
    """Examine a model's directory for the backend that is to serve it."""
    settings, found = configuration.settings, Findings()
    try:
        config = read_model_config(directory) or {}
    except ConfigurationError as error:
        return Findings(error.problems)
    own_format = format_problems(directory)
    found.errors += own_format
    if own_format and not config:
        return found
    contents = _read_all(directory, found)
    backend.examine(found, configuration, directory, config, contents)
    if not own_format:
        found.add(_tokenizer(directory, settings))
    _templates(directory, settings, backend.chat_template(config), found)
    found.add(_placeholder(directory, settings))
    return found


def too_long(configuration: Configuration, positions: int | None) -> list[Problem]:
    """Return a problem if option.max_model_len is more than the model has positions."""
    asked = configuration.settings.max_model_len
    if asked is None or positions is None or asked <= positions:
        return []
    text = (
        f"{configuration.assigned('max_model_len')} is more than the {positions} positions that the model's "
        "config.json states; lower it"
    )
    return [Problem(text, "max_model_len")]


def _read_all(directory: Path, found: Findings) -> dict[str, dict[str, Any]]:
    """Return the JSON files that exist and are complete."""
    contents = {}
    for name in _JSON:
        try:
            strict = name == "tokenizer.json"  # which is large, and read by a library that is strict, too
            read = _read_strictly if strict else read_object
            contents[name] = read(directory / name)
        except (FileNotFoundError, IsADirectoryError):
            continue
        except OSError as error:
            found.add([unreadable(directory / name, error)])
        except (msgspec.MsgspecError, ValueError):
            found.add([f"{directory / name} holds no JSON object: it is damaged; fetch it again"])
    return contents


def _read_strictly(file: Path) -> dict[str, Any]:
    return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])


def _tokenizer(directory: Path, settings: Settings) -> Iterator[str]:
    if settings.trust_remote_code or any(any(directory.glob(pattern)) for pattern in _TOKENIZERS):
        return
    yield f"the model has no tokenizer: there is no tokenizer.json in {directory}; complete the download"


def no_processor(directory: Path) -> str:
    """Return the problem of a model that takes images and does not say how they are prepared."""
    return (
        f"the model takes images, and there is no preprocessor_config.json in {directory} to say how they are "
        "prepared: complete the download"
    )


def _templates(directory: Path, settings: Settings, of_family: object, found: Findings) -> None:
    """Report templates that cannot be parsed as errors; a model without a template is served, but not for chat."""
    try:
        templates: ChatTemplates = read_chat_templates(settings.chat_template, directory, of_family)
    except ModelLoadError as error:
        found.errors.append(Problem(str(error), "chat_template"))
        return
    used = (templates.default, templates.with_tools)
    for template in dict.fromkeys([*templates.named.values(), *(one for one in used if one is not None)]):
        try:
            TemplateSource.parse(template.text)
        except jinja2.TemplateSyntaxError as error:
            text = f"the chat template of {template.origin} has an error in line {error.lineno}: {error.message}"
            other = "" if settings.chat_template is not None else ", or set option.chat_template"
            found.errors.append(Problem(f"{text}; mend it{other}", "chat_template"))
    if not found.errors and not templates.named and used == (None, None):
        known = f"; for tekken.json of the versions {', '.join(VERSIONS)} there is one"
        mistrals = known if (directory / TEKKEN).is_file() else ""
        found.warnings.append(
            Problem(
                "the model has no chat template, so every chat request will be refused: set option.chat_template to "
                f"one (completions and `inputs` work without{mistrals})",
                "chat_template",
            )
        )


def _placeholder(directory: Path, settings: Settings) -> Iterator[str]:
    """Check that the option's token is in the model's vocabulary."""
    token, path = settings.image_placeholder_token, directory / "tokenizer.json"
    if token is None or not path.is_file():
        return
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_file(str(path)).encode(token, add_special_tokens=False).ids
    except Exception as error:  # the library raises nothing narrower
        yield f"{path} cannot be read: {error}"
        return
    if len(ids) != 1:
        name = key_of("image_placeholder_token")
        yield f"{name} = {token!r} is {len(ids)} tokens in this model's tokenizer; name one that is a single token"
