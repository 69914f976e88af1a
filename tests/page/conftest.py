"""A real browser that asks the real server. Where either cannot be had, the tests are skipped and say why."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.live import LiveServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.page)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-page")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # Without its sandbox: it may run as root here, and asks our own server only.
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


class Watched:
    """A page of the browser whose requests and messages are noted."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.asked: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on(
            "console",
            lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None,
        )
        page.goto(url)


@pytest.fixture
def watched(browser: Browser) -> Iterator[Callable[[str], Watched]]:
    """Opens URLs, each in a page of its own."""
    context = browser.new_context()
    yield lambda url: Watched(context.new_page(), url)
    context.close()


@pytest.fixture
def shapes_page(browser: Browser, shapes_server: LiveServer) -> Iterator[Page]:
    """The page of the small model, once it is ready; nothing may come from elsewhere, and nothing may complain."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    watched = Watched(context.new_page(), shapes_server.url)
    watched.page.get_by_role("heading", name="shapes").wait_for()
    yield watched.page
    context.close()
    elsewhere = [url for url in watched.asked if not url.startswith((shapes_server.url, "data:", "blob:"))]
    assert not elsewhere
    refused = "Failed to load resource: the server responded with a status of 4"
    assert not [text for text in watched.complaints if not text.startswith(refused)]
