"""Batch transform: JSON lines, through a stand-in that splits and joins as the platform does."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from handlers.protocols.lmi.batch_transform import MOST_LINES
from tests.support.batch_transform import BatchTransform, TransformFailed
from tests.support.live import LiveServer, data_url, message
from tests.support.scripted_server import ServerProcess
from tests.support.shapes import circle, square

WHAT = "What is this an image of?"
KINDS = [
    (circle("red"), "a red circle"),
    (square("blue"), "a blue square"),
    (circle("green"), "a green circle"),
]
LINES = {"content-type": "application/jsonlines"}


def chat(image: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [message(image, WHAT)], "temperature": 0, "max_tokens": 16, **fields}


def file_of(records: list[Any]) -> bytes:
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


RECORDS = [chat(KINDS[number % 3][0]) for number in range(7)]
RIGHT = [KINDS[number % 3][1] for number in range(7)]


def texts(output: bytes) -> list[str]:
    return [json.loads(line)["choices"][0]["message"]["content"] for line in output.splitlines()]


@pytest.mark.parametrize("strategy", [None, "SingleRecord", "MultiRecord"])
def test_each_record_is_answered_in_order(shapes_server: LiveServer, strategy: str | None) -> None:
    job = BatchTransform(shapes_server.url, strategy=strategy)
    assert texts(job.run(file_of(RECORDS))) == RIGHT
    assert job.sent == (1 if strategy == "MultiRecord" else len(RECORDS))


def test_a_file_larger_than_a_request_is_cut_between_records(shapes_server: LiveServer) -> None:
    job = BatchTransform(shapes_server.url, strategy="MultiRecord", payload_mb=0.005, concurrent=3)
    assert texts(job.run(file_of(RECORDS))) == RIGHT
    assert 1 < job.sent < len(RECORDS)


def test_records_of_every_api_and_their_joined_input(shapes_server: LiveServer) -> None:
    prompt = f"<|user|>![]({data_url(KINDS[1][0])}){WHAT}</s><|assistant|>"
    records = [
        {**RECORDS[0], "id": "a"},
        {"inputs": prompt, "parameters": {"max_new_tokens": 16}, "id": "b"},
        {"prompt": "<|user|>Hello!</s><|assistant|>", "max_tokens": 3, "id": "c"},
    ]
    job = BatchTransform(shapes_server.url, strategy="MultiRecord", join_source=True)
    lines = [json.loads(line) for line in job.run(file_of(records)).splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c"]
    assert lines[0]["SageMakerOutput"]["choices"][0]["message"]["content"] == "a red circle"
    assert lines[1]["SageMakerOutput"] == {"generated_text": "a blue square"}
    assert lines[2]["SageMakerOutput"]["object"] == "text_completion"


@pytest.mark.parametrize("strategy", ["SingleRecord", "MultiRecord"])
def test_a_mistake_in_a_record_costs_no_other(shapes_server: LiveServer, strategy: str) -> None:
    bad = [
        chat(KINDS[0][0]),
        {**RECORDS[0], "temperature": -1},
        {"inputs": "hi", "parameters": {"max_new_tokens": 0}},
        {"what": "?"},
    ]
    bad[0]["messages"] = [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}],
        }
    ]
    file = file_of([RECORDS[0], *bad]) + b"{not json\n" + file_of([RECORDS[1]])
    output = BatchTransform(shapes_server.url, strategy=strategy).run(file)
    lines = [json.loads(line) for line in output.splitlines()]
    assert lines[0]["choices"][0]["message"]["content"] == "a red circle"
    assert lines[-1]["choices"][0]["message"]["content"] == "a blue square"
    told = [line["error"] for line in lines[1:-1]]
    assert [error["type"] for error in told[:2]] == ["invalid_request_error"] * 2
    assert told[0]["code"] == "invalid_image"
    assert "temperature" in told[1]["message"]
    assert "max_new_tokens" in told[2]
    assert [lines[number]["code"] for number in (3, 4, 5)] == [400, 400, 400]


def test_streams_and_blank_lines(shapes_server: LiveServer) -> None:
    wanted = chat(KINDS[0][0], stream=True, stream_options={"include_usage": True})
    lmi = {"inputs": "<|user|>Hello!</s><|assistant|>", "stream": True, "parameters": {"max_new_tokens": 2}}
    body = b"\r\n" + file_of([wanted]).replace(b"\n", b"\r\n") + b"  \n\n" + file_of([lmi]).rstrip()
    reply = shapes_server.http.post("/invocations", content=body, headers=LINES)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/jsonlines")
    assert reply.headers["content-length"] == str(len(reply.content))
    first, second = reply.content.splitlines()
    assert json.loads(first)["choices"][0]["message"]["content"] == "a red circle"
    assert json.loads(second).keys() == {"generated_text"}


def test_bodies_that_no_record_can_be_read_from(shapes_server: LiveServer) -> None:
    def refused(body: bytes) -> str:
        reply = shapes_server.http.post("/invocations", content=body, headers=LINES)
        assert reply.status_code == 400
        text: str = reply.json()["message"]
        return text

    assert "the body has no line" in refused(b"")
    assert "the body has no line" in refused(b"\n \n")
    assert f"more than {MOST_LINES} lines" in refused(b"\n" * (MOST_LINES + 1))
    blank = shapes_server.http.post("/invocations", content=b" " * 2**20, headers=LINES)
    assert (blank.status_code, blank.json()["code"]) == (200, 400)
    many = shapes_server.http.post("/invocations", content=b"{}\n" * MOST_LINES, headers=LINES)
    assert many.status_code == 200
    assert len(many.content.splitlines()) == MOST_LINES


def test_one_log_line_has_the_sums(shapes_server: LiveServer) -> None:
    headers = {**LINES, "x-request-id": "the-batch"}
    reply = shapes_server.http.post("/invocations", content=file_of(RECORDS[:3]), headers=headers)
    answers = [json.loads(line) for line in reply.content.splitlines()]
    assert [answer["id"] for answer in answers] == [f"chatcmpl-the-batch-{number}" for number in range(3)]
    line = shapes_server.wait_for(r"request.*request_id=the-batch .*", 10)
    assert f"completion_tokens={sum(answer['usage']['completion_tokens'] for answer in answers)}" in line
    assert "images=3" in line


def test_execution_parameters_stay_within_the_platforms_limits(shapes_server: LiveServer) -> None:
    told = shapes_server.http.get("/execution-parameters").json()
    assert told["BatchStrategy"] == "SINGLE_RECORD"
    assert told["MaxConcurrentTransforms"] * told["MaxPayloadInMB"] <= 100
    assert told["MaxConcurrentTransforms"] > 1


def test_the_type_that_is_one_object_a_request(shapes_server: LiveServer) -> None:
    job = BatchTransform(shapes_server.url, "application/json", "application/json", strategy="SingleRecord")
    assert texts(job.run(file_of(RECORDS[:2]))) == RIGHT[:2]
    with pytest.raises(TransformFailed, match="400"):
        BatchTransform(shapes_server.url, "application/json", strategy="SingleRecord").run(b'{"what": 1}\n')


def scripted(**order: Any) -> dict[str, Any]:
    return {"inputs": json.dumps(order)}


def test_a_failure_of_the_server_is_not_written_into_the_output(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "model") as container:
        url = container.ready().url
        job = BatchTransform(url, strategy="MultiRecord", retries=1)
        with pytest.raises(TransformFailed, match="500"):
            job.run(file_of([scripted(tokens=2), scripted(tokens=2, fail="known"), scripted(tokens=2)]))
        assert job.sent == 2


def test_lines_wait_for_places_that_others_have(tmp_path: Path) -> None:
    few = ("--option", "max_rolling_batch_size=2", "--option", "job_queue_size=1")
    with ServerProcess(tmp_path / "model", *few) as container, ThreadPoolExecutor(2) as threads:
        url = container.ready().url
        body = file_of([scripted(tokens=3, pause=0.02)] * 10)

        def ask(number: int) -> httpx.Response:
            return httpx.post(f"{url}/invocations", content=body, headers=LINES, timeout=60)

        for reply in threads.map(ask, range(2)):
            assert reply.status_code == 200
            assert [sorted(json.loads(line)) for line in reply.content.splitlines()] == [["generated_text"]] * 10


def test_a_client_that_leaves_ends_all_its_lines(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "model") as container:
        server = container.ready()
        body = file_of([scripted(tokens=100_000, pause=0.01)] * 4)
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                b"POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-type: application/jsonlines\r\n"
                b"content-length: %d\r\n\r\n%b" % (len(body), body)
            )
            while "lmi_requests_in_flight 4.0" not in httpx.get(f"{server.url}/metrics", timeout=60).text:
                pass
        while "lmi_requests_in_flight 0.0" not in httpx.get(f"{server.url}/metrics", timeout=60).text:
            pass
