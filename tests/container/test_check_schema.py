"""`lmi check --json` prints what docs/check.schema.json says, whatever it finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from container.check import run_check
from handlers.backends.instances import INSTANCES
from properties.problem import MASK
from tests.support.shapes import ROOT, SHAPES

SCHEMA: dict[str, Any] = json.loads((ROOT / "docs" / "check.schema.json").read_text())


def report(capsys: pytest.CaptureFixture[str], model: str | None, *options: str) -> tuple[int, dict[str, Any]]:
    """The exit status and what was printed, held to the schema."""
    status = run_check(model, options, True, {"HF_HUB_OFFLINE": "1"})
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    Draft202012Validator(SCHEMA).validate(found)
    assert status == (1 if found["errors"] else 0)
    return status, found


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def test_a_model_that_can_be_served_has_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = report(capsys, str(SHAPES), "api_key=secret", "unheard_of=1", "max_logprobs=5")
    assert status == 0
    assert found.keys() == SCHEMA["properties"].keys() - {"instances"}
    assert found["memory"].keys() == SCHEMA["properties"]["memory"]["properties"].keys()
    assert found["options"]["api_key"]["value"] == MASK
    assert found["extra"].keys() == {"unheard_of", "max_logprobs"}


@pytest.mark.parametrize("count", [1, len(INSTANCES)])
@pytest.mark.parametrize(("model", "options"), [(str(SHAPES), ()), (str(SHAPES), ("dtype=float99",)), ("org/no", ())])
def test_instances(capsys: pytest.CaptureFixture[str], model: str, options: tuple[str, ...], count: int) -> None:
    run_check(model, options, True, {"HF_HUB_OFFLINE": "0"}, instances=list(INSTANCES.values())[:count])
    found = json.loads(capsys.readouterr().out)
    Draft202012Validator(SCHEMA).validate(found)
    assert ("instances" in found) == (count > 1 and not options)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (str(SHAPES), ("dtype=float99",)),
        (str(SHAPES), ("rolling_batch=vllm",)),
        (str(SHAPES), ("tensor_parallel_degree=3",)),
        ("org/not-here", ()),
        ("s3://bucket/prefix/", ()),
        (None, ()),
    ],
)
def test_what_cannot_be_served_or_is_not_here(
    capsys: pytest.CaptureFixture[str], model: str | None, options: tuple[str, ...]
) -> None:
    report(capsys, model, *options)


def test_a_model_with_code_of_its_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("def handle(inputs):\n    return None\n")
    assert report(capsys, str(tmp_path))[1]["handler"] is not None
