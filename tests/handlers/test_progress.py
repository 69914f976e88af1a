"""What people who wait for a model are told."""

from __future__ import annotations

import asyncio
import logging
import queue
import re
import threading

import pytest

from handlers import progress
from handlers.progress import Progress, shown, size_text


def test_a_download_is_told_in_bytes_rate_and_time() -> None:
    loading = Progress()
    assert str(loading) == ""
    loading.begin("", 2 << 30)
    assert re.fullmatch(r"0\.0 MiB of 2\.00 GiB, 0\.0 MiB/s", str(loading))
    loading.done = 512 << 20
    assert re.fullmatch(r"512\.0 MiB of 2\.00 GiB, \S+ [GM]iB/s, \d+ s left", str(loading))
    loading.done = 3 << 30  # more than was announced
    assert str(loading).startswith("2.00 GiB of 2.00 GiB")


def test_a_phase_without_bytes_is_told_in_seconds() -> None:
    loading = Progress()
    loading.begin("weights", 300 << 20)
    loading.done = 100 << 20
    assert re.fullmatch(r"weights 100\.0 MiB of 300\.0 MiB, \S+ \wiB/s, \d+ s left", str(loading))
    assert loading.bar == "[#####...........] "
    loading.begin("warming up", ago=200)
    loading.begin("warming up")
    assert str(loading) == "warming up, 3 min"
    assert loading.bar == ""


def test_a_load_reports_to_whom_it_belongs_and_only_while_it_lasts() -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    with shown(lambda loading: told.put(str(loading)), 0.001) as loading:
        progress.current().begin("", 100)

        async def work() -> Progress:
            return progress.current()

        assert asyncio.run(work()) is loading
        assert told.get(timeout=10).startswith("0.0 MiB of 0.0 MiB")
    assert progress.current() is not loading


def test_a_script_without_a_terminal_finds_it_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    logged = threading.Event()

    class Seen(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.set()

    handler = Seen()
    with caplog.at_level(logging.INFO, "handlers.progress"):
        logging.getLogger("handlers.progress").addHandler(handler)
        with progress.shown_to_script(log_seconds=0.001):
            progress.current().begin("", 3 << 30)
            assert logged.wait(10)
        logging.getLogger("handlers.progress").removeHandler(handler)
    assert caplog.messages[0].startswith("loading the model: 0.0 MiB of 3.00 GiB")


def test_sizes_are_told_as_people_read_them() -> None:
    assert [size_text(1 << 20), size_text(1 << 30)] == ["1.0 MiB", "1.00 GiB"]
