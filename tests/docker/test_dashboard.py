"""The files of docker/ that a container engine, Prometheus and Grafana read, held to what the server exports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support.live import LiveServer, free_port
from tests.support.shapes import ROOT, circle

DOCKER = ROOT / "docker"
_METRIC = re.compile(r"\b((?:lmi|process)_\w+)")


def expressions() -> dict[str, list[str]]:
    """Of each panel of the dashboard, and of its variables."""
    board = json.loads((DOCKER / "grafana" / "lmi.json").read_text())
    found = {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in board["panels"]}
    return found | {item["name"]: [item["query"]] for item in board["templating"]["list"]}


def test_every_series_of_the_dashboard_is_exported(shapes_server: LiveServer) -> None:
    assert shapes_server.chat(circle("red"), "What is this an image of?").status_code == 200
    assert shapes_server.http.post("/invocations", json={}).status_code == 400
    text = shapes_server.http.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    labels: dict[str, set[str]] = {}
    for sample in samples:
        labels.setdefault(sample.name, set()).update(sample.labels)
    for title, texts in expressions().items():
        for expression in texts:
            names = _METRIC.findall(expression)
            assert names, f"{title}: {expression}"
            assert not set(names) - labels.keys(), f"{title}: {expression}"
            for grouped in re.findall(r"by \((\w+)\)", expression):
                assert all(grouped in labels[name] for name in names), f"{title}: {expression}"


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed (Debian's prometheus)")
def test_prometheus_answers_every_query_of_the_dashboard(shapes_server: LiveServer, tmp_path: Path) -> None:
    ours = DOCKER / "prometheus" / "prometheus.yaml"
    subprocess.run(["promtool", "check", "config", str(ours)], check=True, timeout=60)
    config = yaml.safe_load(ours.read_text())
    config["global"]["scrape_interval"] = "200ms"
    config["scrape_configs"][0]["static_configs"] = [{"targets": [shapes_server.url.removeprefix("http://")]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--web.listen-address={address}", f"--config.file={tmp_path}/prometheus.yml"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--storage.tsdb.path={tmp_path}/data"], stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=30, transport=httpx.HTTPTransport(retries=5)) as client:
            for title, texts in expressions().items():
                for text in texts:
                    assert shapes_server.chat(circle("red"), "What is this?").status_code == 200
                    assert shapes_server.http.post("/invocations", json={}).status_code == 400
                    assert _answered(client, text), f"{title}: {text}\n{(tmp_path / 'log').read_text()}"
    finally:
        process.terminate()
        process.wait(30)


def _answered(client: httpx.Client, text: str) -> bool:
    """Whether Prometheus has series for the query, once it has read the server often enough."""
    for name, value in (("$instance", ".*"), ("$__rate_interval", "1m"), ("$__interval", "1m")):
        text = text.replace(name, value)
    path, query = "/api/v1/query", {"query": text}
    if match := re.fullmatch(r"label_values\((\w+), (\w+)\)", text):
        path, query = f"/api/v1/label/{match[2]}/values", {"match[]": match[1]}
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            told = client.get(path, params=query).json()
        except httpx.TransportError:  # it does not listen yet
            continue
        assert told["status"] == "success", told
        if told["data"] if isinstance(told["data"], list) else told["data"]["result"]:
            return True
    return False


@pytest.mark.parametrize("options", [(), ("--profile", "monitoring")])
def test_compose_reads_the_file(options: tuple[str, ...]) -> None:
    tools = (["docker", "compose"], ["docker-compose"], ["podman-compose"])
    there = (tool for tool in tools if shutil.which(tool[0]))
    tool = next(
        (tool for tool in there if not subprocess.run([*tool, "version"], capture_output=True).returncode),
        None,
    )
    if tool is None:
        pytest.skip("neither docker's compose nor podman-compose is installed")
    command = [*tool, "-f", str(DOCKER / "compose.yaml"), *options, "config"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    wanted = {"server", "prometheus", "grafana"} if options else {"server"}
    assert wanted <= yaml.safe_load(shown.stdout)["services"].keys()


def test_the_dashboard_shows_what_an_operator_looks_for() -> None:
    shown = {name for texts in expressions().values() for text in texts for name in _METRIC.findall(text)}
    for name in (
        "http_requests_total", "errors_total", "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket", "requests_running", "requests_waiting", "kv_cache_usage_ratio",
        "images_total", "image_cache_hits_total", "encoder_cache_hits_total", "prefix_cache_hits_total",
    ):  # fmt: skip
        assert f"lmi_{name}" in shown


def test_the_files_of_the_monitoring_profile_fit_together() -> None:
    services = read("compose.yaml")["services"]
    mounted = [part for service in services.values() for part in service["volumes"]]
    for volume in mounted:
        source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
        assert (DOCKER / source).exists(), volume
    (scraped,) = read("prometheus/prometheus.yaml")["scrape_configs"]
    host, port = scraped["static_configs"][0]["targets"][0].split(":")
    assert services[host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert scraped.get("metrics_path", "/metrics") == "/metrics"
    (source,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    board = json.loads((DOCKER / "grafana" / "lmi.json").read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
    assert source["url"].partition("//")[2].split(":")[0] in services
    (provider,) = read("grafana/provisioning/dashboards/lmi.yaml")["providers"]
    assert any(volume.split(":")[1].startswith(provider["options"]["path"]) for volume in mounted)


def test_both_images_are_run_alike() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    gpu, cpu = re.findall(r"# From here to the end as in the target \w+\.\n(.*?)(?=\nFROM|\Z)", text, re.DOTALL)
    assert gpu.strip() == cpu.strip()


def read(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text())
