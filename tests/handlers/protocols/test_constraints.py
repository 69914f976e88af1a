"""Structured answers in every API's words, and what they become."""

from __future__ import annotations

import json
from typing import Any

import pytest

from handlers.errors import InvalidRequest
from handlers.protocols.body_limits import MAX_DEPTH
from handlers.protocols.constraints import MAX_BYTES, read_constraint
from handlers.request import Constraint

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"guided": {"guided_json": None, "guided_json_object": False, "messages": []}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint("json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            Constraint("json_schema", TEXT),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": None},
                }
            },
            Constraint("json_schema", TEXT),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": False},
                }
            },
            Constraint("json_schema", TEXT),
        ),
        *(
            ({"response_format": {"type": "json_object", key: empty}}, Constraint("json_object"))
            for key in ("schema", "value")
            for empty in ({}, "{ }")
        ),
        ({"response_format": {"type": "json_object", "value": SCHEMA}}, Constraint("json_schema", TEXT)),
        ({"response_format": {"type": "json", "value": TEXT}}, Constraint("json_schema", TEXT)),
        (
            {"response_format": {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}},
            Constraint("json_schema", TEXT),
        ),
        ({"response_format": {"type": "regex", "value": "a+"}}, Constraint("regex", "a+")),
        # As llama.cpp and others have it.
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, Constraint("json_schema", TEXT)),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, Constraint("json_schema", TEXT)),
        (
            {"response_format": {"type": "json_schema", "name": "x", "strict": True, "schema": SCHEMA}},
            Constraint("json_schema", TEXT),
        ),
        ({"response_format": {"type": "json_object", "schema": None, "x": None}}, Constraint("json_object")),
        ({"grammar": {"type": "json", "value": SCHEMA}}, Constraint("json_schema", TEXT, "grammar")),
        ({"grammar": {"type": "json", "value": TEXT}}, Constraint("json_schema", TEXT, "grammar")),
        ({"grammar": {"type": "regex", "value": "a+"}}, Constraint("regex", "a+", "grammar")),
        (
            {"grammar": {"type": "json_schema", "value": {"schema": SCHEMA}}},
            Constraint("json_schema", TEXT, "grammar"),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, Constraint("json_schema", TEXT, "structured_outputs")),
        (
            {"structured_outputs": {"json": TEXT, "regex": None}},
            Constraint("json_schema", TEXT, "structured_outputs"),
        ),
        ({"structured_outputs": {"regex": "a+"}}, Constraint("regex", "a+", "structured_outputs")),
        (
            {"structured_outputs": {"choice": ["b", "a", "b"]}},
            Constraint("choice", '["b","a"]', "structured_outputs"),
        ),
        (
            {"structured_outputs": {"grammar": "start: /a/"}},
            Constraint("grammar", "start: /a/", "structured_outputs"),
        ),
        (
            {"structured_outputs": {"json_object": True}},
            Constraint("json_object", None, "structured_outputs"),
        ),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            Constraint("json_schema", TEXT, "structured_outputs", ""),
        ),
        (
            {"structured_outputs": {"json_object": True, "whitespace_pattern": r"[\s]?"}},
            Constraint("json_object", None, "structured_outputs", r"[[ \t\n\r]]?"),
        ),
        ({"guided": {"guided_json": SCHEMA}}, Constraint("json_schema", TEXT, "guided_json")),
        ({"guided": {"guided_regex": "a+"}}, Constraint("regex", "a+", "guided_regex")),
        ({"guided": {"guided_choice": ["é", "b"]}}, Constraint("choice", '["é","b"]', "guided_choice")),
        ({"guided": {"guided_grammar": "root ::= x"}}, Constraint("grammar", "root ::= x", "guided_grammar")),
        ({"guided": {"guided_json_object": True}}, Constraint("json_object", None, "guided_json_object")),
        (
            {"guided": {"guided_json": TEXT, "guided_whitespace_pattern": "[ \n]{0,2}"}},
            Constraint("json_schema", TEXT, "guided_json", "[ \n]{0,2}"),
        ),
        (
            {"response_format": {"type": "text"}, "guided": {"guided_regex": "a"}},
            Constraint("regex", "a", "guided_regex"),
        ),
    ],
)
def test_every_form_becomes_one_constraint(fields: dict[str, Any], want: Constraint | None) -> None:
    assert read_constraint(**fields) == want


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": "json"}, "response_format", "object"),
        ({"response_format": {}}, "response_format", "response_format.type is missing; allowed: 'text'"),
        (
            {"response_format": {"type": {}}},
            "response_format",
            "response_format.type an object is not supported",
        ),
        ({"response_format": {"type": "json_object", "schema": [1]}}, "response_format", "schema must be"),
        ({"response_format": {"type": "json_object", "json_schema": {}}}, "response_format", "'json_schema'"),
        ({"response_format": {"type": "json_object", "shema": {}}}, "response_format", "'shema'"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format", "'schema'"),
        (
            {"response_format": {"type": "json_schema", "schema": {}, "json_schema": {"schema": {}}}},
            "response_format",
            "'json_schema'",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "stict": True}}},
            "response_format",
            "response_format.json_schema has the key 'stict'",
        ),
        ({"response_format": {"type": "regex", "value": "a", "flags": "i"}}, "response_format", "'flags'"),
        ({"grammar": {"type": "regex", "value": "a", "flags": "i"}}, "grammar", "'flags'"),
        (
            {"structured_outputs": {"regex": "a", "disable_whitespace": True}},
            "structured_outputs",
            "'disable_whitespace'",
        ),
        ({"response_format": {"type": "xml"}}, "response_format", "'xml'"),
        ({"response_format": {"type": 7}}, "response_format", "type"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "not supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format",
            "schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
            "response_format",
            "object",
        ),
        ({"response_format": {"type": "regex"}}, "response_format", "value"),
        ({"grammar": {"type": "json"}}, "grammar", "grammar.value"),
        ({"grammar": {"type": "json", "value": "{"}}, "grammar", "not valid JSON"),
        ({"grammar": {"type": "json", "value": "[1]"}}, "grammar", "object"),
        ({"grammar": {"type": "text", "value": "x"}}, "grammar", "'text'"),
        ({"grammar": {"type": "json_schema", "value": SCHEMA}}, "grammar", "schema"),
        ({"grammar": []}, "grammar", "object"),
        ({"structured_outputs": {}}, "structured_outputs", "nothing"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs", "nothing"),
        (
            {"structured_outputs": {"json": {}, "regex": "a"}},
            "structured_outputs",
            "json and structured_outputs.regex",
        ),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs", "structural_tag"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "list"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs", "empty"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs", "texts"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs", "true"),
        ({"structured_outputs": {"regex": 1}}, "structured_outputs", "text"),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": "x"}},
            "structured_outputs",
            "white space",
        ),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": "[^ ]"}},
            "structured_outputs",
            "white space",
        ),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs",
            "JSON schema only",
        ),
        ({"guided": {"guided_regex": ""}}, "guided_regex", "empty"),
        ({"guided": {"guided_json": 3}}, "guided_json", "object"),
        ({"guided": {"guided_json": deep(MAX_DEPTH + 1)}}, "guided_json", "deep"),
        ({"guided": {"guided_json": "[" * 100_000}}, "guided_json", "not valid JSON"),
        ({"guided": {"guided_json": {"enum": ["a" * MAX_BYTES]}}}, "guided_json", "bytes"),
        ({"guided": {"guided_regex": "a" * (MAX_BYTES + 1)}}, "guided_regex", "bytes"),
        ({"guided": {"guided_choice": ["a" * MAX_BYTES]}}, "guided_choice", "bytes"),
        ({"guided": {"guided_regex": "a", "guided_choice": ["a"]}}, "guided_choice", "exclude"),
        (
            {"response_format": {"type": "json_object"}, "guided": {"guided_regex": "a"}},
            "guided_regex",
            "response_format and guided_regex",
        ),
        (
            {"structured_outputs": {"regex": "a"}, "grammar": {"type": "regex", "value": "a"}},
            "grammar",
            "structured_outputs and grammar",
        ),
    ],
)
def test_what_is_malformed_is_named(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_constraint(**fields)
    assert caught.value.param == param
    assert says in caught.value.message
    assert len(caught.value.message) < 400


def test_the_deepest_schema_that_is_allowed() -> None:
    assert read_constraint(guided={"guided_json": deep(MAX_DEPTH)}) is not None


def test_closed_schemas_are_those_of_objects_only() -> None:
    schema = {
        "type": "object",
        "properties": {
            "properties": {"type": "object"},
            "inner": {"properties": {"x": {}}, "enum": [{"properties": {}}]},
            "open": {"properties": {}, "additionalProperties": True},
        },
        "$defs": {"d": {"anyOf": [{"patternProperties": {"a": {}}}]}},
    }
    constraint = read_constraint(structured_outputs={"json": schema, "disable_additional_properties": True})
    assert constraint is not None
    closed = json.loads(constraint.value or "")
    assert closed["additionalProperties"] is False
    assert closed["properties"] == {
        "properties": {"type": "object"},
        "inner": {"properties": {"x": {}}, "enum": [{"properties": {}}], "additionalProperties": False},
        "open": {"properties": {}, "additionalProperties": True},
    }
    assert closed["$defs"]["d"]["anyOf"][0]["additionalProperties"] is False
