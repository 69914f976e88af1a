"""SageMaker's runtime in front of one container, as its clients and its container see it.

A client signs `POST /endpoints/NAME/invocations` or `/invocations-response-stream`; the container gets
`POST /invocations` with the headers that SageMaker passes on and no others; the client gets the container's reply, as
it is or as an event stream whose parts are cut anywhere, or its error as a ModelError.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import json
import re
import struct
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import boto3
import httpx
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials

KEYS = Credentials("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
REGION = "us-east-1"
ENDPOINT = "shapes"

_PREFIX = "x-amzn-sagemaker-"
_PASSED_ON = (
    "content-type", "accept",
    *(
        _PREFIX + name
        for name in (
            "custom-attributes", "inference-id", "session-id", "target-model", "target-variant",
            "inference-component", "prefix-aware-id",
        )
    ),
)  # fmt: skip
_PATH = re.compile(r"/endpoints/([\w-]+)/invocations(-response-stream)?")
_AUTHORIZATION = re.compile(r"AWS4-HMAC-SHA256 Credential=(\S+), SignedHeaders=(\S+), Signature=(\w+)")


class SageMakerFront:
    """Use as a context manager. `passed` is what the container was last sent: headers by name in lower case."""

    def __init__(
        self,
        container: str,
        *,
        seconds: float = 60.0,
        part_bytes: int = 7,
        models: Mapping[str, str] | None = None,
    ) -> None:
        """container: its URL. seconds: for a whole reply, and between the parts of a streamed one.

        part_bytes: the largest payload part, small so that characters and lines are cut. models: of a multi-model
        endpoint, what a client names as TargetModel -> where the platform has put it on the container's disk.
        """
        self.models = models
        self.loaded: list[str] = []  # the one that was used last at the end
        self.evicted: list[str] = []
        self.container = container
        self.seconds = seconds
        self.part_bytes = part_bytes
        self.passed: dict[str, str] = {}
        front = self

        class Handler(_Handler):
            def __init__(self, *given: Any) -> None:
                self.front = front
                super().__init__(*given)

        self._placing = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> SageMakerFront:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def container_of(self, endpoint: str) -> str | None:
        """The URL of an endpoint's container; None if there is no such endpoint."""
        return self.container if endpoint == ENDPOINT else None

    def control(self, call: str, sent: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The reply to a call of the control plane, which this stand-in does not have."""
        return 400, {"__type": "UnknownOperationException", "message": call}

    def path_for(self, target: str | None) -> str | None:
        """The container's path for a request; the model is loaded if need be. None if there is no such model.

        Where the container has no memory for it, those that were used the longest ago are unloaded.
        """
        if self.models is None:
            return "/invocations"
        if target not in self.models:
            return None
        name = hashlib.sha256(target.encode()).hexdigest()[:32]
        with self._placing:
            if name in self.loaded:
                self.loaded.remove(name)
            else:
                body = {"model_name": name, "url": self.models[target]}
                while (reply := httpx.post(f"{self.container}/models", json=body, timeout=90)).status_code == 507:
                    self.evicted.append(self.loaded.pop(0))
                    httpx.delete(f"{self.container}/models/{self.evicted[-1]}", timeout=90).raise_for_status()
                reply.raise_for_status()
            self.loaded.append(name)
        return f"/models/{name}/invoke"

    def client(self, secret: str = KEYS.secret_key, seconds: float = 60) -> Any:
        """An unmodified `sagemaker-runtime` client; each call is made once. seconds: for which it waits for a reply."""
        return boto3.client(
            "sagemaker-runtime",
            endpoint_url=self.url,
            region_name=REGION,
            aws_access_key_id=KEYS.access_key,
            aws_secret_access_key=secret,
            config=Config(retries={"total_max_attempts": 1}, read_timeout=seconds),
        )


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    front: SageMakerFront

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        target = self.headers.get("x-amz-target", "")
        if self.path == "/" and target.startswith("SageMaker."):
            if not self._signed(body):
                return self._refuse(403, "InvalidSignatureException", message="The signature does not match.")
            status, told = self.front.control(target.removeprefix("SageMaker."), json.loads(body))
            return self._send(status, {"Content-Type": "application/x-amz-json-1.1"}, json.dumps(told).encode())
        called = _PATH.fullmatch(self.path)
        container = None if called is None else self.front.container_of(called[1])
        if called is None or container is None:
            return self._refuse(400, "ValidationError", Message="Endpoint not found.")
        if not self._signed(body):
            return self._refuse(403, "InvalidSignatureException", message="The signature does not match.")
        if len(body) > 25 * 2**20:
            return self._refuse(413, "ModelError", Message="The payload is too large.")
        streamed = called[2] is not None
        headers = self.front.passed = self._container_headers(streamed)
        path = self.front.path_for(headers.get(f"{_PREFIX}target-model"))
        if path is None:
            return self._refuse(400, "ValidationError", Message="There is no such target model.")
        try:
            with httpx.stream(
                "POST", container + path, content=body, headers=headers,
                timeout=self.front.seconds,
            ) as reply:  # fmt: skip
                if reply.status_code // 100 != 2:
                    return self._model_error(reply.status_code, reply.read().decode())
                if streamed:
                    return self._stream(reply)
                content = reply.read()
        except httpx.HTTPError:
            return self._model_error(
                0, "Your invocation timed out while waiting for a response from container primary."
            )
        self._send(200, {**self._told(reply), "Content-Type": reply.headers["content-type"]}, content)

    def _signed(self, body: bytes) -> bool:
        """Whether botocore's own signer comes to the signature that the client sent."""
        found = _AUTHORIZATION.fullmatch(self.headers.get("authorization", ""))
        if found is None:
            return False
        signer = SigV4Auth(KEYS, "sagemaker", REGION)
        signed = {name: self.headers[name] for name in found[2].split(";")}
        request = AWSRequest("POST", self.front.url + self.path, headers=signed, data=body)
        request.context["timestamp"] = self.headers["x-amz-date"]
        expected = signer.signature(signer.string_to_sign(request, signer.canonical_request(request)), request)
        return found[1] == signer.scope(request) and hmac.compare_digest(expected, found[3])

    def _container_headers(self, streamed: bool) -> dict[str, str]:
        """What is not part of the runtime's contract is stripped; a streamed call's Accept has a name of its own."""
        headers = {name: self.headers[name] for name in _PASSED_ON if name in self.headers}
        if streamed and (accept := self.headers.get(f"{_PREFIX}accept")):
            headers["accept"] = accept
        # httpx would send an Accept of its own where the client sent none.
        headers.setdefault("accept", "*/*")
        api = "InvokeEndpointWithResponseStream" if streamed else "InvokeEndpoint"
        return {**headers, f"{_PREFIX}forwarded-api": api}

    def _told(self, reply: httpx.Response) -> dict[str, str]:
        """The container's headers that reach the client."""
        told = {"x-Amzn-Invoked-Production-Variant": "AllTraffic"}
        for name in ("custom-attributes", "new-session-id", "closed-session-id"):
            if value := reply.headers.get(_PREFIX + name):
                told[_PREFIX + name] = value
        if value := reply.headers.get(f"{_PREFIX}session-id"):
            told[f"{_PREFIX}new-session-id"] = value
        return told

    def _stream(self, reply: httpx.Response) -> None:
        told = self._told(reply)
        told[f"{_PREFIX}Content-Type"] = reply.headers["content-type"]
        told |= {"Content-Type": "application/vnd.amazon.eventstream", "Transfer-Encoding": "chunked"}
        self._begin(200, told)
        try:
            for part in _parts(reply.iter_raw(), self.front.part_bytes):
                self._chunk(event(part, {":message-type": "event", ":event-type": "PayloadPart"}))
        except httpx.HTTPError:
            broken = {"ErrorCode": "StreamBroken", "Message": "The container ended the stream."}
            headers = {":message-type": "exception", ":exception-type": "ModelStreamError"}
            self._chunk(event(json.dumps(broken).encode(), headers))
        self._chunk(b"")

    def _model_error(self, status: int, text: str) -> None:
        source = "client" if 400 <= status < 500 else "server"
        self._refuse(
            424,
            "ModelError",
            Message=f'Received {source} error ({status}) from primary with message "{text}". See the logs.',
            OriginalStatusCode=status,
            OriginalMessage=text,
            LogStreamArn="arn:aws:logs:us-east-1:123456789012:log-group:/aws/sagemaker/Endpoints/shapes",
            ErrorCode="CLIENT_ERROR_FROM_MODEL" if source == "client" else "INTERNAL_FAILURE_FROM_MODEL",
        )

    def _refuse(self, status: int, kind: str, **fields: Any) -> None:
        self._send(
            status,
            {"x-amzn-ErrorType": kind, "Content-Type": "application/json"},
            json.dumps(fields).encode(),
        )

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self._begin(status, {**headers, "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _parts(chunks: Iterator[bytes], most: int) -> Iterator[bytes]:
    for chunk in chunks:
        for start in range(0, len(chunk), most):
            yield chunk[start : start + most]


def event(payload: bytes, headers: dict[str, str]) -> bytes:
    """A message of `application/vnd.amazon.eventstream`: lengths and their checksum, headers, payload, checksum."""
    encoded = b"".join(
        struct.pack("!B", len(name)) + name.encode() + struct.pack("!BH", 7, len(value)) + value.encode()
        for name, value in headers.items()
    )
    prelude = struct.pack("!II", 16 + len(encoded) + len(payload), len(encoded))
    message = prelude + struct.pack("!I", binascii.crc32(prelude)) + encoded + payload
    return message + struct.pack("!I", binascii.crc32(message))
