"""The manifests of examples/kubernetes, held to what the server reads and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from properties.configuration import resolve
from tests.support.live import LiveServer

MANIFESTS = Path(__file__).parents[2] / "examples" / "kubernetes"


def objects(name: str) -> dict[str, Any]:
    """The objects of a file by their kind."""
    return {item["kind"]: item for item in yaml.safe_load_all((MANIFESTS / name).read_text())}


def container(name: str) -> dict[str, Any]:
    found = objects(name)
    pod = (
        found["Deployment"]["spec"]["template"]["spec"]
        if name == "serve.yaml"
        else found["InferenceService"]["spec"]["predictor"]
    )
    (only,) = pod["containers"]
    return dict(only)


@pytest.mark.parametrize("name", ["serve.yaml", "kserve.yaml"])
def test_every_variable_is_one_that_the_server_obeys(name: str, tmp_path: Path) -> None:
    environ = {item["name"]: item.get("value", "a key") for item in container(name)["env"]}
    configuration = resolve(model=None, environ=environ, model_store=tmp_path)
    assert not configuration.warnings
    assert not configuration.without_effect("rolling")


@pytest.mark.parametrize("name", ["serve.yaml", "kserve.yaml"])
def test_the_probes_are_answered(name: str, shapes_server: LiveServer) -> None:
    probes = {key: value for key, value in container(name).items() if key.endswith("Probe")}
    assert "readinessProbe" in probes
    for key, probe in probes.items():
        assert shapes_server.http.get(probe["httpGet"]["path"]).status_code == 200, key


def test_a_pod_is_killed_only_after_it_has_drained(tmp_path: Path) -> None:
    spec = objects("serve.yaml")["Deployment"]["spec"]["template"]["spec"]
    only = container("serve.yaml")
    environ = {item["name"]: item.get("value", "a key") for item in only["env"]}
    drain = resolve(model=None, environ=environ, model_store=tmp_path).settings.drain_timeout
    command, seconds = only["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert spec["terminationGracePeriodSeconds"] >= int(seconds) + drain + 5


def test_the_service_and_the_monitor_find_the_pods() -> None:
    found = objects("serve.yaml")
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    service = found["Service"]
    assert service["spec"]["selector"].items() <= labels.items()
    names = {port["name"] for port in container("serve.yaml")["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    monitor = objects("monitor.yaml")["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {item["port"] for item in monitor["endpoints"]} <= {port["name"] for port in service["spec"]["ports"]}
