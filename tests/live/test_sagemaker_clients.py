"""SageMaker's own clients, through a front that speaks its runtime API, ask the model in the repository."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, EventStreamError

from tests.support.live import LiveServer, data_url, message
from tests.support.sagemaker_front import ENDPOINT, KEYS, REGION, SageMakerFront
from tests.support.sagemaker_platform import sdk
from tests.support.scripted_server import ServerProcess
from tests.support.shapes import circle, square

CIRCLE, SQUARE = circle("red"), square("blue")
WHAT = "What is this an image of?"
CHAT = {"messages": [message(CIRCLE, WHAT)], "temperature": 0, "max_tokens": 32}


def prompt(text: str, *images: Any) -> str:
    """A raw prompt in the model's own format, with images as LMI's `inputs` take them here."""
    links = "".join(f"![]({data_url(image)})" for image in images)
    return f"<|user|>{links}{text}</s><|assistant|>"


LMI = {"inputs": prompt(WHAT, CIRCLE), "parameters": {"max_new_tokens": 32}}


@pytest.fixture(scope="module")
def server(shapes_server: LiveServer) -> LiveServer:
    return shapes_server


@pytest.fixture(scope="module")
def front(server: LiveServer) -> Iterator[SageMakerFront]:
    with SageMakerFront(server.url) as running:
        yield running


@pytest.fixture(scope="module")
def client(front: SageMakerFront) -> Any:
    return front.client()


def invoke(client: Any, body: Any, **fields: Any) -> dict[str, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"ContentType": "application/json", **fields}
    reply: dict[str, Any] = client.invoke_endpoint(EndpointName=ENDPOINT, Body=data, **fields)
    reply["Body"] = reply["Body"].read()
    return reply


def streamed(client: Any, body: Any, **fields: Any) -> tuple[str, bytes]:
    """Content type and bytes; checks that they came in many parts."""
    reply = client.invoke_endpoint_with_response_stream(
        EndpointName=ENDPOINT, Body=json.dumps(body), ContentType="application/json", **fields
    )
    parts = [event["PayloadPart"]["Bytes"] for event in reply["Body"]]
    assert len(parts) > 1
    return reply["ContentType"], b"".join(parts)


def refused(client: Any, body: Any, **fields: Any) -> dict[str, Any]:
    with pytest.raises(client.exceptions.ModelError) as caught:
        invoke(client, body, **fields)
    return caught.value.response


def test_chat_about_an_image(client: Any) -> None:
    reply = invoke(client, CHAT)
    assert reply["ContentType"] == "application/json"
    (choice,) = json.loads(reply["Body"])["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("a red circle", "stop")
    (choice,) = json.loads(invoke(client, {**CHAT, "max_tokens": 2})["Body"])["choices"]
    assert choice["finish_reason"] == "length"
    body = {"messages": [message(CIRCLE, SQUARE, "What is in the second image?")], "temperature": 0}
    assert json.loads(invoke(client, body)["Body"])["choices"][0]["message"]["content"] == "a blue square"


def test_chat_streamed(client: Any) -> None:
    content_type, data = streamed(client, {**CHAT, "stream": True, "stream_options": {"include_usage": True}})
    assert content_type == "text/event-stream; charset=utf-8"
    *events, done, rest = data.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
    said = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(said) == "a red circle"
    assert chunks[-1]["usage"]["completion_tokens"] > 0


def test_chat_streamed_as_lines_for_whom_asks_for_them(client: Any, front: SageMakerFront) -> None:
    content_type, data = streamed(client, {**CHAT, "stream": True}, Accept="application/jsonlines")
    assert front.passed["accept"] == "application/jsonlines"
    assert content_type == "application/jsonlines"
    chunks = [json.loads(line) for line in data.splitlines()]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == "a red circle"


def test_the_lmi_body(client: Any) -> None:
    assert json.loads(invoke(client, LMI)["Body"]) == {"generated_text": "a red circle"}
    detailed = {**LMI, "parameters": {"details": True, "decoder_input_details": True, "top_n_tokens": 2}}
    details = json.loads(invoke(client, detailed)["Body"])["details"]
    assert details["finish_reason"] == "eos_token"
    assert "".join(token["text"] for token in details["tokens"][:-1]) == "a red circle"
    assert details["tokens"][-1]["special_token"] is True
    assert [len(position) for position in details["top_tokens"]] == [2] * details["generated_tokens"]
    assert len(details["prefill"]) > 10


def test_the_lmi_body_constrained(client: Any) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    for parameters, right in (
        ({"guided_choice": ["a cat", "a dog"]}, lambda text: text in ("a cat", "a dog")),
        ({"grammar": {"type": "regex", "value": "[xyz]{3}"}}, lambda text: set(text) <= set("xyz")),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}, None),
    ):
        body = {
            "inputs": prompt(WHAT, CIRCLE),
            "parameters": {**parameters, "max_new_tokens": 60, "details": True},
        }
        reply = json.loads(invoke(client, body)["Body"])
        text = reply["generated_text"]
        if right is not None:
            assert right(text), text
        elif reply["details"]["finish_reason"] != "length":
            assert isinstance(json.loads(text)["n"], int)


def test_several_answers_the_best_first(client: Any) -> None:
    parameters = {"best_of": 3, "n": 2, "do_sample": True, "temperature": 2.0, "details": True, "seed": 5}
    reply = json.loads(invoke(client, {**LMI, "parameters": parameters})["Body"])
    (other,) = reply["details"]["best_of_sequences"]
    totals = [sum(token["log_prob"] for token in one["tokens"]) for one in (reply["details"], other)]
    assert totals[0] >= totals[1]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/models"),
        ("POST", "/models"),
        ("GET", "/models/model"),
        ("DELETE", "/models/model"),
        ("POST", "/workflows"),
        ("POST", "/invocations-bidirectional-stream"),
    ],
)
def test_routes_that_are_not_offered(server: LiveServer, method: str, path: str) -> None:
    reply = server.http.request(method, path)
    assert reply.status_code == 404
    assert "no such route" in reply.text
    assert "openapi.json" in reply.text


def test_a_list_of_prompts_is_answered_in_order(client: Any) -> None:
    asked = [prompt(WHAT, SQUARE), prompt(WHAT), prompt(WHAT, CIRCLE)]
    replies = json.loads(invoke(client, {"inputs": asked})["Body"])
    assert [reply["generated_text"] for reply in replies] == [
        "a blue square",
        "I see no image.",
        "a red circle",
    ]


def test_the_lmi_body_streamed_as_lines_and_as_events(client: Any) -> None:
    content_type, data = streamed(client, {**LMI, "stream": True})
    assert content_type == "application/jsonlines"
    lines = [json.loads(line) for line in data.splitlines()]
    assert "".join(line["token"]["text"] for line in lines) == "a red circle"
    assert lines[-1]["generated_text"] == "a red circle"
    content_type, data = streamed(client, {**LMI, "stream": True}, Accept="text/event-stream")
    assert content_type == "text/event-stream; charset=utf-8"
    events = [json.loads(event.removeprefix(b"data: ")) for event in data.split(b"\n\n")[:-1]]
    assert events == lines


def test_a_whole_reply_may_be_asked_for_through_the_streaming_api(client: Any) -> None:
    content_type, data = streamed(client, LMI)
    assert content_type == "application/json"
    assert json.loads(data) == {"generated_text": "a red circle"}


def test_plain_text(client: Any) -> None:
    reply = invoke(client, prompt(WHAT, CIRCLE).encode(), ContentType="text/plain", Accept="*/*")
    assert json.loads(reply["Body"]) == {"generated_text": "a red circle"}


@pytest.mark.parametrize("accept", [None, "*/*", "application/json", "text/event-stream", "image/png"])
def test_any_accept_header_is_answered(client: Any, accept: str | None) -> None:
    fields = {} if accept is None else {"Accept": accept}
    assert json.loads(invoke(client, LMI, **fields)["Body"]) == {"generated_text": "a red circle"}


def test_every_field_of_the_call_is_understood_or_harmless(client: Any, front: SageMakerFront) -> None:
    reply = invoke(
        client,
        CHAT,
        Accept="application/json",
        CustomAttributes="trace=1;flag;=x;model_name=a=b",
        TargetVariant="AllTraffic",
        InferenceId="order-4711",
    )
    assert "red circle" in reply["Body"].decode()
    assert reply["InvokedProductionVariant"] == "AllTraffic"
    assert "CustomAttributes" not in reply
    assert front.passed["x-amzn-sagemaker-inference-id"] == "order-4711"


def test_headers_that_mean_nothing_here_are_ignored(server: LiveServer) -> None:
    headers = {
        "X-Amzn-SageMaker-Target-Model": "other.tar.gz",
        "X-Amzn-SageMaker-Target-Variant": "b",
        "X-Amzn-SageMaker-Inference-Component": "component",
        "X-Amzn-SageMaker-Prefix-Aware-Id": "prefix",
        "X-Amzn-SageMaker-Something-New": "x",
        "x-synchronous": "false",
    }
    reply = server.http.post("/invocations", json=LMI, headers=headers)
    assert (reply.status_code, reply.json()) == (200, {"generated_text": "a red circle"})
    assert not {"x-next-token", "x-amzn-sagemaker-custom-attributes"} & reply.headers.keys()


def test_an_asynchronous_invocation_is_answered_whole_and_says_how_long_it_is(server: LiveServer) -> None:
    headers = {"X-Amzn-SageMaker-Accept": "application/jsonlines", "Accept": ""}
    reply = server.http.post("/invocations", json={**LMI, "stream": True}, headers=headers)
    assert reply.headers["content-type"] == "application/jsonlines"
    reply = server.http.post("/invocations", json=LMI, headers=headers)
    assert reply.json() == {"generated_text": "a red circle"}
    assert int(reply.headers["content-length"]) == len(reply.content)


def test_an_adapter_may_be_named_anywhere_and_no_other_is_told(server: LiveServer) -> None:
    for name in ("X-Amzn-SageMaker-Adapter-Identifier", "x-AMZN-sagemaker-ADAPTER-identifier"):
        reply = server.http.post("/invocations", json=LMI, headers={name: "poet"})
        assert (reply.status_code, reply.json()["message"]) == (404, "there is no adapter 'poet'")
    for path in ("/invocations?adapter=poet", "/predictions/model?adapter=poet"):
        assert server.http.post(path, json=LMI).status_code == 404
    reply = server.http.post("/invocations?adapter=poet", json=LMI, headers={name: "another"})
    assert reply.json()["message"] == "there is no adapter 'another'"


def test_the_inference_id_is_the_requests_id(client: Any, server: LiveServer) -> None:
    reply = json.loads(invoke(client, CHAT, InferenceId="order-4712")["Body"])
    assert reply["id"] == "chatcmpl-order-4712"
    server.wait_for("order-4712", 10)


def test_a_bad_request_is_a_model_error_with_its_status_and_text(client: Any) -> None:
    response = refused(client, {"inputs": "hi", "parameters": {"max_new_tokens": 0}})
    assert response["OriginalStatusCode"] == 400
    assert response["ResponseMetadata"]["HTTPStatusCode"] == 424
    told = json.loads(response["OriginalMessage"])
    assert told["code"] == 400
    assert "parameters.max_new_tokens" in told["message"]
    told = json.loads(refused(client, {"messages": []})["OriginalMessage"])
    assert told["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("status", "body", "fields"),
    [
        (400, b"", {}),
        (400, b"{", {}),
        (400, {"what": "?"}, {}),
        (400, {"inputs": prompt(WHAT, *[CIRCLE] * 5)}, {}),
        (400, {"inputs": "![](data:image/png;base64,QUJD)"}, {}),
        (404, {**LMI, "adapters": "poet"}, {}),
        (404, LMI, {"CustomAttributes": "X-Amzn-SageMaker-Adapter-Identifier=poet"}),
        (415, b"a,b", {"ContentType": "text/csv"}),
        (415, b"--b--", {"ContentType": "multipart/form-data; boundary=b"}),
        (415, b"inputs=hi", {"ContentType": "application/x-www-form-urlencoded"}),
        (415, b"PK", {"ContentType": "tensor/npz"}),
        (415, b"x", {"ContentType": "application/x-npy"}),
        (415, b"\x89PNG", {"ContentType": "image/png"}),
        (400, LMI, {"SessionId": "unknown"}),
    ],
)
def test_statuses_before_the_reply(client: Any, status: int, body: Any, fields: dict[str, str]) -> None:
    response = refused(client, body, **fields)
    assert response["OriginalStatusCode"] == status
    told = json.loads(response["OriginalMessage"])
    assert told["code"] == status
    assert told["message"]


def test_a_streamed_request_that_is_wrong_fails_before_its_stream(client: Any) -> None:
    with pytest.raises(client.exceptions.ModelError) as caught:
        streamed(client, {**CHAT, "stream": True, "temperature": -1})
    assert caught.value.response["OriginalStatusCode"] == 400
    assert "temperature" in caught.value.response["OriginalMessage"]


def test_a_session_from_opening_to_closing(client: Any) -> None:
    reply = invoke(client, {"requestType": "NEW_SESSION"}, SessionId="NEW_SESSION")
    session = reply["NewSessionId"].partition(";")[0]
    assert "Expires=" in reply["NewSessionId"]
    assert "red circle" in invoke(client, CHAT, SessionId=session)["Body"].decode()
    assert streamed(client, {**LMI, "stream": True}, SessionId=session)[0] == "application/jsonlines"
    assert invoke(client, {"requestType": "CLOSE"}, SessionId=session)["ClosedSessionId"] == session
    assert refused(client, CHAT, SessionId=session)["OriginalStatusCode"] == 400


def test_the_front_checks_signatures_and_endpoints(front: SageMakerFront, client: Any) -> None:
    with pytest.raises(ClientError) as caught:
        invoke(front.client(secret="another"), CHAT)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    with pytest.raises(client.exceptions.ClientError, match="Endpoint not found"):
        client.invoke_endpoint(EndpointName="nowhere", Body=b"{}")


def test_a_timeout_of_the_platform_aborts_the_request(server: LiveServer) -> None:
    endless = {"messages": [message("Hello!")], "max_tokens": 900, "ignore_eos": True}
    with SageMakerFront(server.url, seconds=0.2) as hasty:
        assert refused(hasty.client(), endless)["OriginalStatusCode"] == 0
    server.wait_for(r"client_gone", 10)
    assert "red circle" in server.chat(CIRCLE, WHAT).text


def test_what_happens_to_a_stream_after_its_first_token(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "model") as container, SageMakerFront(container.ready().url) as front:
        client = front.client()

        def ask(order: dict[str, Any]) -> Any:
            body = {"inputs": json.dumps(order), "stream": True}
            reply = client.invoke_endpoint_with_response_stream(
                EndpointName=ENDPOINT, Body=json.dumps(body), ContentType="application/json"
            )
            return iter(reply["Body"])

        data = b"".join(event["PayloadPart"]["Bytes"] for event in ask({"tokens": 2, "fail": "known"}))
        told = json.loads(data.splitlines()[-1])
        assert told["code"] == 500
        assert "engine died" in told["error"]

        events = ask({"tokens": 1000, "pause": 0.05})
        next(events)
        container.signal(signal.SIGKILL)
        with pytest.raises(EventStreamError, match="ModelStreamError"):
            list(events)


SDK = """
import json, sys
import boto3, sagemaker
from botocore.config import Config
from sagemaker.djl_inference import DJLPredictor
from sagemaker.iterators import LineIterator
from sagemaker.predictor import Predictor
from sagemaker.serializers import JSONSerializer

url, endpoint, region, key, secret = sys.argv[1:]
chat, lmi = json.load(sys.stdin)
boto = boto3.Session(aws_access_key_id=key, aws_secret_access_key=secret, region_name=region)
runtime = boto.client("sagemaker-runtime", endpoint_url=url, config=Config(retries={"total_max_attempts": 1}))
session = sagemaker.Session(boto, sagemaker_runtime_client=runtime, default_bucket="unused")
djl = DJLPredictor(endpoint, session)
plain = Predictor(endpoint, session, serializer=JSONSerializer())
print(json.dumps({
    "chat": djl.predict(chat),
    "lmi": djl.predict(lmi),
    "bytes": plain.predict(lmi).decode(),
    "lines": [line.decode() for line in djl.predict_stream({**lmi, "stream": True}, iterator=LineIterator)],
}))
"""


def test_the_sdks_predictors(front: SageMakerFront) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SDK, front.url, ENDPOINT, REGION, KEYS.access_key, KEYS.secret_key],
        input=json.dumps([CHAT, LMI]),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": sdk(), "SAGEMAKER_SUPPRESS_V2_WARNING": "1"},
    )
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["chat"]["choices"][0]["message"]["content"] == "a red circle"
    assert told["lmi"] == json.loads(told["bytes"]) == {"generated_text": "a red circle"}
    lines = [json.loads(line) for line in told["lines"]]
    assert lines[-1]["generated_text"] == "a red circle"
