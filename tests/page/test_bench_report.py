"""The page of `lmi bench` in a browser."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.openai_stand_in import StandIn

if TYPE_CHECKING:
    from tests.page.conftest import Watched


def test_the_report_opens_alone_and_shows_both_servers(watched: Callable[[str], Watched], tmp_path: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe

    path = tmp_path / "report.html"
    with StandIn("one", gap=0.005).open() as one, StandIn("other", gap=0.01, refuse=5).open() as other:
        load = ("--streams", "1,2,4", "--requests", "8", "--images", "0", "--warmup", "0")
        command = [sys.executable, "-m", "container.cli", "bench", one.url, other.url, *load]
        subprocess.run([*command, "--report", str(path)], check=True, capture_output=True)
    opened = watched(path.as_uri())
    page = opened.page
    assert page.locator(".card h2").all_inner_texts() == [one.url[7:], other.url[7:]]
    assert page.locator("figure svg").count() == 4
    assert page.locator("figure path[d]").count() == 2 + 3 * 4
    numbers = page.locator("table").first
    assert numbers.locator("tbody tr").count() == 6
    assert numbers.locator("td.bad").all_inner_texts() == ["1", "2", "1"]
    errors = page.locator("table").last.locator("tbody tr").all_inner_texts()
    assert len(errors) == 3
    assert all("429" in text and "too <b>many</b>" in text for text in errors)
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        faults = Axe().run(page).response["violations"]
        assert not [fault["id"] for fault in faults if fault["impact"] in ("serious", "critical")]
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.asked == [path.as_uri()]
    assert not opened.complaints
