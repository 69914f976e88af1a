"""The page in a browser: what a person does and sees."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.live import LiveServer
from tests.support.sagemaker_front import ENDPOINT, SageMakerFront
from tests.support.sagemaker_platform import environment, sdk
from tests.support.scripted_server import ServerProcess

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

    from tests.page.conftest import Watched

IMAGES = Path(__file__).parents[2] / "examples" / "shapes" / "pictures"
DROP = """([target, files]) => {
    const data = new DataTransfer();
    for (const { name, type, bytes } of files)
        data.items.add(new File([Uint8Array.from(atob(bytes), (letter) => letter.charCodeAt(0))], name, { type }));
    document.querySelector(target).dispatchEvent(
        new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


def drop(page: Page, *files: tuple[str, str, bytes]) -> None:
    """Files as name, type and bytes, dropped on the composer."""
    given = [{"name": name, "type": kind, "bytes": base64.b64encode(data).decode()} for name, kind, data in files]
    page.evaluate(DROP, ["#composer", given])
    page.locator("#images li").nth(len(files) - 1).wait_for()


def image(name: str) -> tuple[str, str, bytes]:
    return name, f"image/{'png' if name.endswith('png') else 'jpeg'}", (IMAGES / name).read_bytes()


def ask(page: Page, question: str) -> None:
    page.get_by_label("Message", exact=True).fill(question)
    page.get_by_role("button", name="Send").click()


def answered(page: Page) -> str:
    """The last answer, once it is whole."""
    page.get_by_role("button", name="Regenerate").wait_for()
    return page.locator(".turn.assistant .text").last.inner_text()


def test_an_image_that_is_dropped_is_answered_about(shapes_page: Page) -> None:
    drop(shapes_page, image("red-circle.png"))
    ask(shapes_page, "What is this an image of?")
    assert answered(shapes_page) == "a red circle"
    note = shapes_page.locator(".turn.assistant footer").inner_text()
    assert re.search(r"\d+ prompt tokens, \d+ of them images · \d+ tokens · first after \d+ ms", note)


def test_images_are_chosen_and_pasted_and_keys_alone_send_them(shapes_page: Page) -> None:
    shapes_page.locator("#files").set_input_files(IMAGES / "red-circle.png")
    name, kind, data = image("yellow-star.png")
    given = {"name": name, "type": kind, "bytes": base64.b64encode(data).decode()}
    shapes_page.locator("#images li").first.wait_for()
    shapes_page.evaluate(
        DROP.replace('DragEvent("drop", { dataTransfer', 'ClipboardEvent("paste", { clipboardData'), ["body", [given]]
    )
    shapes_page.locator("#images li").nth(1).wait_for()
    shapes_page.get_by_label("Message", exact=True).focus()
    shapes_page.keyboard.type("What is in the second image?")
    shapes_page.keyboard.press("Enter")
    assert "yellow star" in answered(shapes_page)


def test_the_order_of_images_is_that_of_the_page(shapes_page: Page) -> None:
    drop(shapes_page, image("red-circle.png"), image("yellow-star.png"))
    shapes_page.get_by_role("button", name="Move yellow-star.png to the left").click()
    assert shapes_page.locator("#images img").first.get_attribute("alt") == "yellow-star.png"
    shapes_page.locator("#images li").nth(0).drag_to(shapes_page.locator("#images li").nth(1))
    assert shapes_page.locator("#images img").first.get_attribute("alt") == "red-circle.png"
    ask(shapes_page, "What is in the first image?")
    assert "red circle" in answered(shapes_page)


def test_turns_follow_are_edited_and_answered_again(shapes_page: Page) -> None:
    drop(shapes_page, image("red-circle.png"))
    ask(shapes_page, "What is this an image of?")
    answered(shapes_page)
    ask(shapes_page, "What color is it?")
    assert answered(shapes_page) == "red"
    shapes_page.get_by_role("button", name="Regenerate").click()
    assert answered(shapes_page) == "red"
    shapes_page.get_by_role("button", name="Edit").last.click()
    assert shapes_page.get_by_label("Message", exact=True).input_value() == "What color is it?"
    assert shapes_page.locator(".turn").count() == 2
    shapes_page.get_by_role("button", name="New chat").click()
    assert shapes_page.locator(".turn").count() == 0


def test_an_example_answers_at_once(shapes_page: Page) -> None:
    shapes_page.locator("#examples button").first.click()
    assert answered(shapes_page)
    assert shapes_page.locator(".turn.user img").count() == 1


def test_a_refused_image_shows_the_reason_of_the_server(shapes_page: Page) -> None:
    drop(shapes_page, ("broken.png", "image/png", b"\x89PNG\r\n\x1a\n" + b"no image"))
    ask(shapes_page, "What is this?")
    shapes_page.locator(".turn .error").wait_for()
    assert "image 0" in shapes_page.locator(".turn .error").inner_text()
    drop(shapes_page, image("red-circle.png"))
    ask(shapes_page, "What is this an image of?")
    assert answered(shapes_page)


def test_a_file_that_is_no_image_is_named(shapes_page: Page) -> None:
    shapes_page.evaluate(DROP, ["#composer", [{"name": "notes.txt", "type": "text/plain", "bytes": ""}]])
    shapes_page.get_by_role("alert").filter(has_text="notes.txt is not an image.").wait_for()


def test_an_answer_can_be_held_to_a_schema(shapes_page: Page) -> None:
    shapes_page.get_by_text("Parameters", exact=True).click()
    shapes_page.get_by_label("JSON schema the answer must match").fill('{"enum": ["yes"]')
    ask(shapes_page, "Is there a circle?")
    shapes_page.get_by_role("alert").filter(has_text="The JSON schema is not JSON").wait_for()
    shapes_page.get_by_label("JSON schema the answer must match").fill('{"enum": ["yes"]}')
    ask(shapes_page, "Is there a circle?")
    assert answered(shapes_page) == '"yes"'


@pytest.mark.parametrize("kind", ["curl", "openai", "sagemaker", "tgi"])
def test_a_request_copied_runs_as_pasted(
    shapes_page: Page, shapes_server: LiveServer, kind: str, tmp_path: Path
) -> None:
    drop(shapes_page, image("red-circle.png"))
    shapes_page.get_by_label("Message", exact=True).fill("What is this an image of?")
    shapes_page.get_by_label("Copy the request as").select_option(kind)
    shapes_page.get_by_role("button", name="Copy request").click()
    shapes_page.get_by_role("status").filter(has_text="Copied.").wait_for()
    program = tmp_path / "pasted"
    program.write_text(shapes_page.evaluate("navigator.clipboard.readText()"))
    with SageMakerFront(shapes_server.url) as front:
        environ = dict(os.environ)
        if kind == "sagemaker":
            environ |= {**environment(front), "PYTHONPATH": sdk(), "ENDPOINT_NAME": ENDPOINT}
        done = subprocess.run(
            ["bash" if kind in ("curl", "tgi") else sys.executable, str(program)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=environ,
        )
    assert "red circle" in done.stdout, done.stdout + done.stderr


def test_the_pages_are_reached_by_keys_and_have_no_serious_fault(shapes_page: Page) -> None:
    from axe_playwright_python.sync_playwright import Axe

    drop(shapes_page, image("red-circle.png"))
    ask(shapes_page, "What is this an image of?")
    answered(shapes_page)
    shapes_page.get_by_role("tab", name="Try").focus()
    for name in ("Try", "Watch", "Model"):
        assert shapes_page.get_by_role("tabpanel", name=name).is_visible()
        for theme in ("light", "dark"):
            shapes_page.emulate_media(color_scheme=theme)
            faults = Axe().run(shapes_page).response["violations"]
            serious = [fault for fault in faults if fault["impact"] in ("serious", "critical")]
            assert not serious, [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in serious]
        shapes_page.keyboard.press("ArrowRight")


def test_the_page_fits_a_phone(shapes_page: Page) -> None:
    shapes_page.set_viewport_size({"width": 360, "height": 640})
    for name in ("Try", "Watch", "Model"):
        shapes_page.get_by_role("tab", name=name).click()
        assert shapes_page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name


def test_the_model_is_described(shapes_page: Page) -> None:
    shapes_page.get_by_role("tab", name="Model").click()
    facts = shapes_page.locator("#facts").inner_text()
    assert "up to 4 in a prompt" in facts
    row = shapes_page.locator("#options tr", has_text="limit_mm_per_prompt").inner_text()
    assert '{"image": 4' in row
    assert "command line" in row
    shapes_page.get_by_role("link", name="deploy").click()
    shapes_page.get_by_text("# Deploy").wait_for()


# A model that answers until it is told to stop


@pytest.fixture
def tiny_page(browser: Browser, tiny_server: LiveServer) -> Iterator[Page]:
    context = browser.new_context()
    page = context.new_page()
    page.goto(tiny_server.url)
    page.locator("#facts dd").first.wait_for(state="attached")
    yield page
    context.close()


def test_stop_ends_an_answer_in_the_engine_too(browser: Browser, tmp_path: Path) -> None:
    from tests.support.models import make_llava  # imports torch

    model = make_llava(tmp_path / "long", max_position_embeddings=32768)
    with LiveServer(model) as server, browser.new_context() as context:
        page = context.new_page()

        def never_ends_by_itself(route: Route) -> None:
            route.continue_(post_data={**route.request.post_data_json, "max_tokens": 32000, "ignore_eos": True})

        page.route("**/v1/chat/completions", never_ends_by_itself)
        page.goto(server.url)
        page.locator("#facts dd").first.wait_for(state="attached")
        ask(page, "Go on.")
        page.locator(".turn.assistant .text", has_text=re.compile(r"\S")).wait_for()
        page.get_by_role("button", name="Stop").click()
        page.locator(".turn.assistant footer", has_text="stopped").wait_for()
        page.get_by_role("tab", name="Watch").click()
        page.get_by_text("No request is running.").wait_for()
        assert server.metrics()["lmi_requests_running"] == 0


def test_the_batch_shows_each_request(tiny_page: Page, tiny_server: LiveServer) -> None:
    tiny_page.get_by_role("tab", name="Watch").click()
    enough = threading.Event()

    def client(number: int) -> None:
        while not enough.is_set():
            body = {"prompt": f"Go {number}", "max_tokens": 400, "ignore_eos": True}
            tiny_server.http.post("/v1/completions", json=body, timeout=120)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for one in clients:
        one.start()
    try:
        tiny_page.locator("#batch .bar.decode").nth(7).wait_for()
        assert tiny_page.locator("#batch li").count() <= 8
    finally:
        enough.set()
        for one in clients:
            one.join()
    tiny_page.get_by_text("No request is running.").wait_for()
    plot = tiny_page.locator(".plot", has_text="Tokens generated")
    plot.locator("path[d]").wait_for(state="attached")  # two readings of the metrics later


def test_the_page_shows_how_far_loading_is(watched: Callable[[str], Watched], tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "m", SCRIPTED_LOAD="halfway") as server:
        page = watched(server.listening().url).page
        page.locator("#status", has_text="the model is loading: 1.00 GiB of 2.00 GiB").wait_for()


def test_a_key_is_asked_for(browser: Browser, tiny_llava: Path) -> None:
    with LiveServer(tiny_llava, "page=true", SERVING_API_KEY="open sesame") as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        page.get_by_label("API key").fill("open sesame")
        page.get_by_role("button", name="Use").click()
        page.locator("#facts dd").first.wait_for(state="attached")
        ask(page, "Hello")
        answered(page)
        assert page.locator(".turn .error").count() == 0
        context.close()
