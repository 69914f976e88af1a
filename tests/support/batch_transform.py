"""SageMaker's batch transform in front of one container: it splits a file into requests and joins their replies.

As its guide has it: what the job leaves open is asked of `/execution-parameters`; a 4xx fails the file, anything else
that is not a 2xx is sent again, and `join_source` wants as many lines in a reply as there were in its request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx


class TransformFailed(Exception):
    """The container refused a part of the file, or could not answer it."""


@dataclass
class BatchTransform:
    """A transform job. What is None is left to the container, and then to SageMaker's own default."""

    container: str
    content_type: str = "application/jsonlines"
    accept: str | None = "application/jsonlines"
    split_type: str | None = "Line"
    strategy: str | None = None
    payload_mb: float | None = None
    concurrent: int | None = None
    assemble_with: str | None = "Line"
    join_source: bool = False
    retries: int = 3
    sent: int = 0

    def run(self, file: bytes) -> bytes:
        """Return the output for one input file."""
        asked = httpx.get(f"{self.container}/execution-parameters", timeout=60)
        wanted = asked.json() if asked.status_code == 200 else {}
        strategy = self.strategy or wanted.get("BatchStrategy", "MULTI_RECORD")
        single = strategy.replace("_", "").lower() == "singlerecord"
        most = int((self.payload_mb or wanted.get("MaxPayloadInMB", 6)) * 2**20)
        requests = list(self._batches(file, single, most)) if self.split_type == "Line" else [file]
        with ThreadPoolExecutor(self.concurrent or wanted.get("MaxConcurrentTransforms", 1)) as threads:
            replies = list(threads.map(self._send, requests))
        if self.join_source:
            replies = [_joined(*pair) for pair in zip(requests, replies, strict=True)]
        ends = b"\n" if self.assemble_with == "Line" else b""
        return b"".join(reply.removesuffix(ends) + ends for reply in replies)

    def _batches(self, file: bytes, single: bool, most: int) -> Iterator[bytes]:
        batch = b""
        for line in file.splitlines(keepends=True):
            if batch and (single or len(batch) + len(line) > most):
                yield batch
                batch = b""
            batch += line
        if batch:
            yield batch

    def _send(self, body: bytes) -> bytes:
        headers = {"content-type": self.content_type, "accept": self.accept or "*/*"}
        for _ in range(1 + self.retries):
            self.sent += 1
            reply = httpx.post(f"{self.container}/invocations", content=body, headers=headers, timeout=120)
            if reply.status_code // 100 == 2:
                return reply.content
            if reply.status_code // 100 == 4:
                break
        raise TransformFailed(f"{reply.status_code}: {reply.text}")


def _joined(request: bytes, reply: bytes) -> bytes:
    inputs, outputs = request.splitlines(), reply.splitlines()
    if len(inputs) != len(outputs):
        raise TransformFailed(f"{len(inputs)} records were sent, {len(outputs)} came back")
    pairs = zip(inputs, outputs, strict=True)
    return b"\n".join(json.dumps({**json.loads(a), "SageMakerOutput": json.loads(b)}).encode() for a, b in pairs)
