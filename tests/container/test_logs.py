"""Log lines and metrics: one event a line whatever is in it, and cumulative buckets."""

from __future__ import annotations

import io
import json
import logging

from prometheus_client.parser import text_string_to_metric_families

from container.logs import logging_to
from container.metrics import Metrics
from handlers.backends.base import BackendStats
from handlers.request import RequestFacts

HOSTILE = "a\r\n2026-01-01T00:00:00.000Z INFO fake: line\x1b[31m\u2028"


def written(form: str) -> list[str]:
    stream = io.StringIO()
    log = logging.getLogger("test")
    with logging_to(stream, form):  # type: ignore[arg-type]
        log.info("hello %s", HOSTILE, extra={"facts": {"id": HOSTILE, "none": None, "n": 1}})
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            log.exception("failed")
    return stream.getvalue().split("\n")[:-1]


def test_a_text_line_stays_one_line() -> None:
    lines = written("text")
    assert "hello a\\r\\n2026" in lines[0]
    assert lines[0].endswith(" n=1")
    assert "\x1b" not in lines[0]
    assert "none=" not in lines[0]
    assert lines[1].endswith("ERROR test: failed")
    assert all(line.startswith("  | ") for line in lines[2:])
    assert lines[2] == "  | Traceback (most recent call last):"


def test_a_json_line_is_one_object() -> None:
    first, second = map(json.loads, written("json"))
    assert first["message"] == f"hello {HOSTILE}"
    assert first["id"] == HOSTILE
    assert "none" not in first
    assert second["traceback"].startswith("Traceback")


def test_a_passing_line_gives_way_to_the_next() -> None:
    stream = io.StringIO()
    log = logging.getLogger("test")
    with logging_to(stream):
        log.info("half of it\x1b", extra={"passing": True})
        log.info("x" * 1000, extra={"passing": True})
        log.info("ready")
    half, cut, ready = stream.getvalue().split("\r\x1b[K")
    assert half == "half of it\\x1b"
    assert {*cut} == {"x"}
    assert len(cut) < 1000
    assert ready.endswith("INFO test: ready\n")


def test_a_log_that_nobody_reads_holds_nobody_up() -> None:
    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            raise BlockingIOError

    logging.raiseExceptions, before = False, logging.raiseExceptions
    try:
        with logging_to(Stuck(), "text"):
            for _ in range(30_000):
                logging.getLogger("test").info("x")
    finally:
        logging.raiseExceptions = before


def test_metrics_are_what_was_observed() -> None:
    stats = BackendStats(running=3, waiting=2, kv_blocks_used=1, kv_blocks_total=4, prefix_cache_hits=9)
    metrics = Metrics(lambda: stats)
    facts = RequestFacts("r", "/x", images=2, prompt_tokens=5, total=0.3, finish_reason="stop")
    metrics.on_admitted(facts)
    for seconds in (0.0005, 0.001, 0.0011, 99):
        metrics.on_token_gap(seconds)
    assert list(metrics.running.values()) == [facts]
    metrics.on_finished(facts)
    assert not metrics.running
    metrics.on_error('odd"kind\n')
    page, content_type = metrics.export("text/plain")
    assert content_type.startswith("text/plain")
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }
    gap = "lmi_inter_token_latency_seconds"
    assert found[gap + "_bucket", "0.001"] == 2
    assert found[gap + "_bucket", "0.002"] == 3
    assert found[gap + "_bucket", "5.0"] == 3
    assert found[gap + "_bucket", "+Inf"] == 4
    assert found[gap + "_count",] == 4
    assert round(found[gap + "_sum",], 4) == 99.0026
    assert found["lmi_images_total",] == 2
    assert found["lmi_requests_in_flight",] == 0
    assert found["lmi_requests_waiting",] == 2
    assert found["lmi_kv_cache_usage_ratio",] == 0.25
    assert found["lmi_prefix_cache_hits_total",] == 9
    assert found["lmi_errors_total", 'odd"kind\n'] == 1
    assert found["lmi_requests_finished_total", "stop"] == 1
