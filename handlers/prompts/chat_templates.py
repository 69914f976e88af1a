"""A model's chat templates: the files that contain them, which one a request gets, and what their source shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox
import msgspec
from jinja2 import meta, nodes

from engine.errors import ModelLoadError, one_line
from properties.model import read_object

DEFAULT, TOOL_USE = "default", "tool_use"
"""The names that transformers uses to choose a template."""


class Template(NamedTuple):
    """A chat template.

    Attributes:
        text: Jinja source.
        origin: The file or option that it comes from, for people.
    """

    text: str
    origin: str


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """The templates of a model; None for `default` or `with_tools` if it has no template for that case.

    Attributes:
        named: All of them, for requests that choose one.
        default: For requests without tools.
        with_tools: For requests with tools.
    """

    named: Mapping[str, Template] = field(default_factory=dict)
    default: Template | None = None
    with_tools: Template | None = None

    @classmethod
    def only(cls, text: str, origin: str = "") -> ChatTemplates:
        """Return a single template that is used for every request."""
        template = Template(text, origin)
        return cls({DEFAULT: template}, template, template)

    def chosen(self, asked: str | None, tools: bool) -> str | None:
        """Return the source for a request. asked: a name, or a source of its own; None for the model's choice."""
        if asked is not None:
            return self.named[asked].text if asked in self.named else asked
        template = self.with_tools if tools else self.default
        return None if template is None else template.text

    @property
    def all(self) -> dict[str, str]:
        """Each source once, with a description of it."""
        found = {template.text: f"the chat template {name!r}" for name, template in self.named.items()}
        usual = (self.default, self.with_tools)
        return found | {template.text: "the chat template" for template in usual if template is not None}

    def described(self) -> str:
        """Describe which is used, as "chat_template.jinja; with tools tool_use of tokenizer_config.json"."""
        if self.default is None and self.with_tools is None:
            return f"none by default, of {', '.join(sorted(self.named))}" if self.named else "none"
        text = "none without tools" if self.default is None else self._described(self.default)
        if self.with_tools is not None and self.with_tools != self.default:
            text += f"; with tools {self._described(self.with_tools)}"
        return text

    def _described(self, template: Template) -> str:
        names = [name for name, other in self.named.items() if other == template]
        return f"{names[0]} of {template.origin}" if len(self.named) > 1 and names else template.origin


class _Entry(msgspec.Struct):
    name: str
    template: str


def read_chat_templates(setting: str | None, path: Path, otherwise: object = None) -> ChatTemplates:
    """Return the templates with which a model is served. It reads a few small files.

    Args:
        setting: `option.chat_template`: the name of one of the model's templates, a file (absolute, or in the model's
            directory), or a template's text. The last two replace all of the model's own.
        path: The model's directory.
        otherwise: The template in the code for the model's tokenizer or family, if the model's files contain none.

    Raises:
        ModelLoadError: The setting is none of these, or a file cannot be read.
    """
    if setting is not None and ("{" in setting or "\n" in setting):
        return ChatTemplates.only(setting, "option.chat_template")
    own = _of_model(path, otherwise)
    if setting is None:
        return own
    if setting in own.named:
        return ChatTemplates(own.named, own.named[setting], own.named[setting])
    try:
        return ChatTemplates.only(Path(path, setting).read_text(encoding="utf-8"), "option.chat_template")
    except (OSError, ValueError) as error:
        names = f" (the model has {', '.join(sorted(own.named))})" if own.named else ""
        raise ModelLoadError(
            f"option.chat_template {setting!r} is neither a template nor a readable file, nor the name of one of "
            f"the model's templates{names}"
        ) from error


def _of_model(path: Path, otherwise: object) -> ChatTemplates:
    """Return the templates that transformers finds; vLLM's rule chooses between the processor's and the tokenizer's.

    Without tools, the processor's default takes precedence, since images need it; with tools, the tokenizer's templates
    do, since a processor has none for tools. The tokenizer's separate files win over the entry in its configuration.
    """
    tokenizer = _files(path) or _entry(path, "tokenizer_config.json") or _named(otherwise, "the code for the model")
    has_processor = any((path / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))
    processor = _processors(path) if has_processor or not tokenizer else {}
    named = {**processor, **tokenizer}
    default = processor.get(DEFAULT, tokenizer.get(DEFAULT))
    with_tools = tokenizer.get(TOOL_USE, tokenizer.get(DEFAULT)) or processor.get(TOOL_USE, default)
    if default is not None:
        named[DEFAULT] = default
    return ChatTemplates(named, default, with_tools)


def _processors(path: Path) -> dict[str, Template]:
    """The entry in processor_config.json wins over files, and the older chat_template.json over the newer files."""
    own = _entry(path, "processor_config.json")
    return own or {**_files(path), **_entry(path, "chat_template.json")}


def _files(path: Path) -> dict[str, Template]:
    found: dict[str, Template] = {}
    one = path / "chat_template.jinja"
    if one.is_file():
        found[DEFAULT] = Template(_text(one), one.name)
    folder = path / "additional_chat_templates"
    for file in sorted(folder.glob("*.jinja")):
        found[file.name.removesuffix(".jinja")] = Template(_text(file), f"{folder.name}/{file.name}")
    return found


def _entry(path: Path, name: str) -> dict[str, Template]:
    file = path / name
    if not file.is_file():
        return {}
    try:
        entries = read_object(file)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{name} of the model cannot be read: {one_line(error)}") from error
    return _named(entries.get("chat_template"), name)


def _named(given: object, origin: str) -> dict[str, Template]:
    try:
        found = msgspec.convert(given, str | dict[str, str] | list[_Entry] | None)
    except msgspec.ValidationError as error:
        raise ModelLoadError(
            f"the chat_template of {origin} is neither a text nor a list of names and templates"
        ) from error
    if isinstance(found, list):
        found = {one.name: one.template for one in found}
    texts = {DEFAULT: found} if isinstance(found, str) else found or {}
    return {name: Template(text, origin) for name, text in texts.items()}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file.name} of the model cannot be read: is it UTF-8?") from error


ContentFormat = Literal["string", "openai"]

_PART_FILTERS = frozenset({"selectattr", "rejectattr", "map"})


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, a block of transformers' own; it is parsed only to examine its content."""

    tags = {"generation"}  # noqa: RUF012 - the base class has it as a plain set

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


_ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
)


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """What the source of a template shows.

    Attributes:
        content_format: "openai" if the template loops over a message's content, or else "string".
        accepts_strings: The template tests somewhere whether a value `is string`, so a plain string is safe.
        variables: The variables that it reads, without Jinja's globals.
        printed: The text that it prints itself.
        searched: The strings that it compares, splits or filters by.
    """

    content_format: ContentFormat
    accepts_strings: bool
    variables: frozenset[str]
    printed: str
    searched: str

    @classmethod
    def parse(cls, source: str) -> TemplateSource:
        """Parse a template. Raises jinja2.TemplateSyntaxError."""
        tree = _ENVIRONMENT.parse(source)
        outside = meta.find_undeclared_variables(tree) - set(_ENVIRONMENT.globals)
        return cls(
            content_format="openai" if _loops_over_content(tree) else "string",
            accepts_strings=any(test.name == "string" for test in tree.find_all(nodes.Test)),
            variables=frozenset(outside - {"raise_exception", "strftime_now"}),
            printed="\x00".join([data.data for data in tree.find_all(nodes.TemplateData)] + _strings(tree)),
            searched="\x00".join(
                s
                for kind in (nodes.Compare, nodes.Call, nodes.Filter)
                for n in tree.find_all(kind)
                for s in _strings(n)
            ),
        )


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether a `for` or a filter over parts iterates over a message's content: directly, renamed or in a macro.

    The rule is vLLM's (`renderers/hf.py`), so that a template is treated in the same way.
    """
    names = _content_names(tree)
    walked = [loop.iter for loop in tree.find_all(nodes.For)]
    walked += [f.node for f in tree.find_all(nodes.Filter) if f.name in _PART_FILTERS and f.node is not None]
    return any(_is_content(expression, names) for expression in walked)


def _content_names(tree: nodes.Template) -> set[str]:
    names: set[str] = set()
    macros = {macro.name: [arg.name for arg in macro.args] for macro in tree.find_all(nodes.Macro)}
    while True:
        before = len(names)
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
                names.add(assign.target.name)
        for call in tree.find_all(nodes.Call):
            if not isinstance(call.node, nodes.Name) or call.node.name not in macros:
                continue
            parameters = macros[call.node.name]
            names.update(p for p, a in zip(parameters, call.args, strict=False) if _is_content(a, names))
            names.update(k.key for k in call.kwargs if k.key in parameters and _is_content(k.value, names))
        if len(names) == before:
            return names


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    match node:
        case nodes.Name():
            return node.name in names
        case nodes.Getattr():
            return node.attr == "content"
        case nodes.Getitem():
            if isinstance(node.arg, nodes.Const):
                return bool(node.arg.value == "content")
            return isinstance(node.arg, nodes.Slice) and _is_content(node.node, names)
        case nodes.Filter() | nodes.Test():
            return _is_content(node.node, names)
        case nodes.CondExpr():
            return _is_content(node.expr1, names) or _is_content(node.expr2, names)
        case nodes.Or() | nodes.And():
            return _is_content(node.left, names) or _is_content(node.right, names)
    return False


def _strings(node: nodes.Node) -> list[str]:
    return [const.value for const in node.find_all(nodes.Const) if isinstance(const.value, str)]
