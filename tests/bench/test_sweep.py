"""`lmi bench`: what is sent to servers that are up, what is counted, and what is said of it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import page, report, sweep
from bench.client import Reply
from bench.live import View
from bench.load import Load
from bench.servers import Server
from container.cli import main
from tests.support.live import LiveServer
from tests.support.openai_stand_in import StandIn
from tests.support.tls import certificate

SMALL = ("--images", "0", "--warmup", "0", "--tokens", "4")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    """The exit status, what was found, and what was written to the standard error."""
    status = main(["bench", "--json", "--report", "page.html", *arguments])
    said = capsys.readouterr()
    return status, json.loads(said.out) if said.out else None, said.err


def row(rate: float, seconds: float, refused: int = 0) -> dict[str, Any]:
    """A load of 100 requests, `rate` whole replies a second, each of which took `seconds`."""
    times = {"p50": 0.0, "p90": 0.0, "p99": 0.0, "mean": 1000 * seconds}
    outcomes = {"200": 100 - refused, "429": refused}
    return {"requests": 100, "outcomes": outcomes, "requests_per_s": rate, "e2e_ms": times}


# Servers


def test_our_server_is_measured_with_images(
    capsys: pytest.CaptureFixture[str], shapes_server: LiveServer, in_a_folder: Path
) -> None:
    load = ("--streams", "1,4", "--requests", "8", "--warmup", "2", "--size", "48x64", "--tokens", "5")
    status, found, _ = bench(capsys, f"{shapes_server.url}/v1", *load)
    assert status == 0
    assert found["servers"] == [{"name": shapes_server.url.removeprefix("http://"), "model": "shapes"}]
    assert [level["name"] for level in found["levels"]] == ["1 stream", "4 streams"]
    for level in found["levels"]:
        (one,) = level["servers"]
        assert one["outcomes"] == {"200": 8}
        assert one["tokens_per_s"] == pytest.approx(5 * one["requests_per_s"])
        assert (one["load"]["width"], one["load"]["height"]) == (48, 64)
        assert 0 < one["ttft_ms"]["p50"] <= one["e2e_ms"]["p50"]
    assert "shapes" in (in_a_folder / "page.html").read_text()


def test_as_many_requests_as_asked_for_are_sent_and_timed(capsys: pytest.CaptureFixture[str]) -> None:
    with StandIn(first=0.05, gap=0.04, tokens=3).open() as server:
        status, found, said = bench(capsys, server.url, *SMALL, "--streams", "1,2", "--requests", "6")
    assert status == 0
    assert len(server.log) == 12
    assert server.log[0][1]["ignore_eos"] is True
    assert server.log[0][1]["max_tokens"] == 4
    for level in found["levels"]:
        times = level["servers"][0]
        assert times["ttft_ms"]["p50"] >= 50
        assert times["e2e_ms"]["p50"] >= 170
        # A token that was read late came sooner after the one before it: half of the gap is enough.
        assert times["itl_ms"]["p50"] >= 20
        assert times["tpot_ms"]["p50"] >= 20
    assert "1 stream, " in said
    assert "6 requests" in said


def test_two_servers_are_asked_in_turns_and_compared(capsys: pytest.CaptureFixture[str]) -> None:
    one = StandIn("one")
    with one.open(), StandIn("other", first=0.03, log=one.log).open() as other:
        load = (*SMALL, "--streams", "1,2", "--requests", "3", "--words", "5")
        status, found, _ = bench(capsys, one.url, other.url, *load)
    assert status == 0
    assert [name for name, _ in one.log] == ["one"] * 3 + ["other"] * 6 + ["one"] * 3
    sent = [str(body["messages"]) for _, body in one.log]
    assert sent[:3] == sent[3:6]
    assert sorted(sent[6:9]) == sorted(sent[9:])
    assert len({*sent}) == 6
    assert [server["model"] for server in found["servers"]] == ["one-model", "other-model"]
    for level in found["levels"]:
        first, second = level["servers"]
        ratios = level["times_better"]
        assert ratios["requests_per_s"] == pytest.approx(first["requests_per_s"] / second["requests_per_s"])
        assert ratios["ttft_ms p50"] == pytest.approx(second["ttft_ms"]["p50"] / first["ttft_ms"]["p50"])


@pytest.mark.parametrize("file", ["missing/page.html", "."])
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str], file: str
) -> None:
    with StandIn().open() as server:
        status, found, said = bench(capsys, server.url, *SMALL, "--report", file)
    assert (status, found, server.log) == (1, None, [])
    assert f"{file} cannot be written; name another file with --report" in said


def test_refused_requests_are_counted_by_status(capsys: pytest.CaptureFixture[str], in_a_folder: Path) -> None:
    with StandIn(refuse=3).open() as server:
        status, found, said = bench(capsys, server.url, *SMALL, "--streams", "1,2", "--requests", "9")
    assert status == 0
    assert [level["servers"][0]["outcomes"] for level in found["levels"]] == [{"200": 6, "429": 3}] * 2
    assert found["knees"] == [None]
    assert "3 failed" in said
    text = (in_a_folder / "page.html").read_text()
    assert "too &lt;b&gt;many" in text
    assert "<b>" not in text


def test_a_server_that_answers_nothing_ends_the_sweep_and_has_no_times(
    capsys: pytest.CaptureFixture[str], in_a_folder: Path
) -> None:
    with StandIn(refuse=1).open() as server:
        status, found, said = bench(capsys, server.url, *SMALL, "--streams", "1,2,4", "--requests", "3")
    assert status == 1
    assert len(server.log) == 3
    assert [level["name"] for level in found["levels"]] == ["1 stream"]
    assert "gave no whole reply: {'429': 3}" in said
    assert "TTFT n/a / n/a ms, ITL n/a / n/a ms, 3 failed" in said
    (times,) = found["levels"][0]["servers"]
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        assert times[name] == dict.fromkeys(("p50", "p90", "p99", "mean", "max"))
    assert "TTFT p50 n/a ms, p99 n/a ms, ITL p50 n/a ms" in sweep.verdict(found)[0]
    assert "n/a / n/a / n/a" in report.table({"one": times})
    assert "<dd>– ms <small>p99 – ms</small></dd>" in (in_a_folder / "page.html").read_text()


def test_time_ends_a_load(capsys: pytest.CaptureFixture[str]) -> None:
    with StandIn(first=0.02).open() as server:
        load = (*SMALL, "--streams", "1", "--requests", "1000", "--seconds", "0.1")
        _, found, _ = bench(capsys, server.url, *load)
    count = found["levels"][0]["servers"][0]["requests"]
    assert 1 <= count <= 5
    assert found["levels"][0]["servers"][0]["outcomes"] == {"200": count}


def test_requests_can_arrive_at_a_rate_and_end_where_the_model_ends(
    capsys: pytest.CaptureFixture[str], in_a_folder: Path
) -> None:
    with StandIn().open() as server:
        load = (*SMALL, "--rate", "100,200", "--requests", "4", "--no-ignore-eos", "--model", "other")
        _, found, _ = bench(capsys, server.url, *load)
    assert [level["name"] for level in found["levels"]] == ["100 requests/s", "200 requests/s"]
    assert all("ignore_eos" not in body and body["model"] == "other" for _, body in server.log)
    assert "requests sent a second" in (in_a_folder / "page.html").read_text()


# Keys and addresses

KEY = "sk-not-for-anybody"


def test_a_key_is_sent_over_tls_and_never_written(
    capsys: pytest.CaptureFixture[str], in_a_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = certificate(in_a_folder, "host.test")
    monkeypatch.setenv("SSL_CERT_FILE", str(folder))
    monkeypatch.setenv("THE_KEY", KEY)
    load = (*SMALL, "--streams", "1", "--requests", "2")
    with StandIn(key=KEY, prefix="/base").open(folder) as server:
        status, _, said = bench(capsys, f"{server.url}/v1/", *load, "--key-variable", "THE_KEY")
        assert status == 0
        assert len(server.log) == 2
        assert KEY not in said + (in_a_folder / "page.html").read_text()
        assert bench(capsys, server.url, *load)[0] == 1
    with StandIn(key="another").open() as server:
        status, found, said = bench(capsys, server.url, *load, "--key-variable", "THE_KEY", "--model", "named")
        assert status == 1
        assert found["levels"][0]["servers"][0]["outcomes"] == {"401": 2}
        assert "Bearer *** is not the key" in said
        assert KEY not in said + json.dumps(found) + (in_a_folder / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("http://127.0.0.1:9",), "127.0.0.1:9 does not answer GET /v1/models: "),
        (("ftp://127.0.0.1",), "is not a URL such as http://127.0.0.1:8080"),
        (("127.0.0.1:8080",), "is not a URL such as"),
        (("http://user:secret@127.0.0.1",), "without a user, a password or a query"),
        (
            ("http://127.0.0.1:9", "--key-variable", "NO_SUCH"),
            "NO_SUCH: there is no such environment variable",
        ),
        (("http://a", "http://b", "http://c"), "one or two URLs"),
        (("http://a", "--model", "x", "--model", "y"), "--model is given 2 times for 1 URLs"),
        (("http://a", "http://a/v1", "--model", "x"), "the two URLs are the same server and model"),
    ],
)
def test_what_cannot_be_measured_says_why(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    status, found, why = bench(capsys, *arguments)
    assert status == 1
    assert found is None
    assert said in why
    assert "secret" not in why


@pytest.mark.parametrize("value", ["0", "-1", "1,,2", "two", "1.5"])
def test_a_load_must_be_numbers(capsys: pytest.CaptureFixture[str], value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "http://127.0.0.1:9", "--streams", value])
    assert "is not a whole number of at least 1" in capsys.readouterr().err


def test_the_extra_is_named_where_it_is_missing() -> None:
    program = "import sys; sys.modules['rich'] = None; from container.cli import main; sys.exit(main(['bench', 'x']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "lmi bench needs rich: pip install 'lmi-handler[bench]'\n"


# Numbers


def test_the_knee_is_where_throughput_over_time_is_most() -> None:
    # Of clients N and whole replies a second X, X / time is X * X / N: 100, 200, 324, 200, 50.
    rows = [row(10, 0.1), row(20, 0.1), row(36, 4 / 36), row(40, 8 / 40), row(20, 0.4)]
    assert report.knee(rows) == 2
    assert report.knee(rows[:3]) is None  # the last of them: it may lie beyond
    refused = [*rows[:2], row(36, 4 / 36, refused=2), *rows[3:]]
    assert report.knee(refused) == 1
    assert report.knee([row(10, 0.1, refused=1), row(11, 0.2)]) == 0  # 1 %
    assert report.knee([row(0, 0, refused=100)] * 2) is None
    assert report.knee([]) is None  # interrupted before the first load was complete


def test_a_sentence_says_where_the_knee_is() -> None:
    times = {"p50": 12.0, "p90": 20.0, "p99": 34.5, "mean": 15.0}
    one = {**row(20, 0.1), "tokens_per_s": 1280.0, "ttft_ms": times, "itl_ms": times}
    levels = [{"name": name, "servers": [one], "times_better": None} for name in ("1 stream", "8 streams")]
    found = {"servers": [{"name": "a:80"}], "levels": levels, "knees": [0]}
    (line,) = sweep.verdict(found)
    assert line.startswith("a:80: the knee is at 1 stream, which give 1280 tokens/s, 20.0 requests/s, TTFT p50 12 ms,")
    assert sweep.verdict({**found, "knees": [None]})[0].startswith("a:80: no knee up to 8 streams")


def test_a_page_is_made_of_loads_without_a_whole_reply() -> None:
    nothing = {
        name: dict.fromkeys(("p50", "p90", "p99", "mean")) for name in ("ttft_ms", "itl_ms", "e2e_ms", "tpot_ms")
    }
    failed = {
        **row(0, 0, refused=100),
        **nothing,
        "tokens_per_s": 0.0,
        "errors": ["<script>"],
        "client_cores": 0.9,
    }
    results = sweep.results(
        [Server("<a>", "a", 1, "<m>"), Server("b", "b", 1, "m")],
        "text",
        [sweep.level("big", [failed, failed])],
    )
    text = page.html(results)
    assert "<script>" not in text
    assert "&lt;a&gt;" in text
    assert "used 0.90 of it" in text


def test_a_terminal_shows_what_has_run_and_what_runs() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    view, target, load = View(console), Server("a:80", "a", 80, "m"), Load(streams=2, requests=4)
    times = {"p50": 12.0, "p90": 20.0, "p99": 34.0, "mean": 15.0}
    ended = Reply(1.0, 200, [1.5, 1.75], 2.0, 9, 5)
    with view:
        view.add(target, load, {**row(20, 0.1), "tokens_per_s": 1280.0, "ttft_ms": times, "itl_ms": times})
        with view.watch(target, load, []):
            console.print(view)
        with view.watch(target, load, [ended, Reply(1.0), Reply(1.0, 429, end=1.5)]):
            console.print(view)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1280" in shown
    assert "12 / 34" in shown
    assert "warming up" in shown
    assert "500" in shown  # ms to the first token
    assert "250" in shown  # ms between tokens
