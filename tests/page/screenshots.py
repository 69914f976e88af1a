"""The images of the page in the README, and of the report in docs/benchmark.md:  python -m tests.page.screenshots"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from tests.support.live import LiveServer, chat_body

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples" / "shapes"


def main() -> None:
    """Write docs/page-try.png, docs/page-watch.png and docs/bench-report.png."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with LiveServer(SHAPES, 'limit_mm_per_prompt={"image": 4}') as server:
            page_of_the_server(browser, server)
            with LiveServer(SHAPES, "max_rolling_batch_size=4") as other:
                report_of_a_benchmark(browser, server, other)
        browser.close()


def page_of_the_server(browser: Browser, server: LiveServer) -> None:
    page = browser.new_page(viewport={"width": 900, "height": 620})
    page.goto(server.url)
    page.locator("#examples button").first.click()
    page.get_by_role("button", name="Regenerate").wait_for()
    page.get_by_label("Message", exact=True).fill("How many shapes are there?")
    page.get_by_role("button", name="Send").click()
    page.locator(".turn").nth(3).get_by_role("button", name="Regenerate").wait_for()
    page.screenshot(path=ROOT / "docs" / "page-try.png")

    page.set_viewport_size({"width": 900, "height": 900})
    page.get_by_role("tab", name="Watch").click()
    done = threading.Event()

    def load(number: int) -> None:
        image = Image.open(SHAPES / "pictures" / "red-circle.png")
        body = chat_body(image, "What is this?", max_tokens=150 + 20 * number, ignore_eos=True)
        while not done.is_set():
            server.http.post("/v1/chat/completions", json=body)

    clients = [threading.Thread(target=load, args=(number,)) for number in range(8)]
    for client in clients:
        client.start()
    page.wait_for_timeout(40_000)
    page.locator("#batch .bar.decode").nth(6).wait_for()
    page.screenshot(path=ROOT / "docs" / "page-watch.png")
    done.set()
    for client in clients:
        client.join()


def report_of_a_benchmark(browser: Browser, server: LiveServer, other: LiveServer) -> None:
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.html"
        command = ("bench", server.url, other.url, "--streams", "1,2,4,8,16,32", "--tokens", "32")
        subprocess.run([sys.executable, "-m", "container.cli", *command, "--report", str(report)], check=True)
        page = browser.new_page(viewport={"width": 1100, "height": 1050})
        page.goto(report.as_uri())
        page.screenshot(path=ROOT / "docs" / "bench-report.png")


if __name__ == "__main__":
    main()
