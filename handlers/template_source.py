"""What a chat template's source tells before it is rendered: the content it wants, the variables it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import meta, nodes

ContentFormat = Literal["string", "openai"]

_PART_FILTERS = frozenset({"selectattr", "rejectattr", "map"})


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, transformers' own block: parsed here only to look inside."""

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
    """Facts about one template.

    content_format: "openai" where the template loops over a message's content, else "string".
    accepts_strings: the template asks somewhere whether a value `is string`, so a bare string is safe.
    variables: names that it reads from outside and that are no Jinja globals.
    printed: the text that it prints itself; searched: strings that it compares, splits or filters by.
    """

    content_format: ContentFormat
    accepts_strings: bool
    variables: frozenset[str]
    printed: str
    searched: str

    @classmethod
    def parse(cls, source: str) -> TemplateSource:
        """Raises jinja2.TemplateSyntaxError."""
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
    """Whether a `for` or a filter over parts walks a message's content: directly, renamed or in a macro.

    The rule is vLLM's (`renderers/hf.py`), so that a template means the same here and there.
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
