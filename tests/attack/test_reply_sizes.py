"""What a child process sends is bounded, and a message says whose reply was too large."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from engine.config import Vocabulary
from handlers.custom.messages import MAX_PART_BYTES
from handlers.grammars.compiler import MOST_OUTCOME_BYTES, Worker
from handlers.grammars.messages import Job
from tests.support.live import LiveServer

HANDLER = """
from djl_python import Output

def handle(inputs):
    if inputs.is_empty():
        return None
    asked = inputs.get_as_json()
    if asked["do"] == "stream":
        return Output().add_stream_content(iter([b"a", bytes(asked["bytes"])]), lambda item: item)
    if asked["do"] == "pid":
        return str(os.getpid())
    return bytes(asked["bytes"])
"""


def test_a_handlers_reply_above_the_limit_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(HANDLER)
    with LiveServer(tmp_path) as server:

        def ask(**body: object) -> httpx.Response:
            return server.http.post("/invocations", json=body)

        pid = ask(do="pid").text
        largest = ask(do="whole", bytes=MAX_PART_BYTES)
        assert (largest.status_code, len(largest.content)) == (200, MAX_PART_BYTES)
        for size in (MAX_PART_BYTES + 1, 3 * MAX_PART_BYTES):
            refused = ask(do="whole", bytes=size)
            assert refused.status_code == 500
            assert refused.json()["message"] == (
                f"the model's own handler failed: a reply of {size} bytes is larger than {MAX_PART_BYTES} bytes, the "
                "most that is sent on; stream it in smaller parts"
            )
        streamed = ask(do="stream", bytes=MAX_PART_BYTES + 1).text
        assert streamed.startswith("a{")
        assert f"a part of its stream of {MAX_PART_BYTES + 1} bytes is larger than" in streamed
        assert ask(do="pid").text == pid, "the process lives on"


def test_a_grammar_compilers_reply_is_bounded() -> None:
    """The length comes first: a process gone wrong is not waited for, nor its gigabytes kept."""

    async def main() -> None:
        worker = Worker("tests.support.long_reply_worker")
        await worker.start(Vocabulary("{}", 10, 10))
        with pytest.raises(EOFError, match=f"allowed: {MOST_OUTCOME_BYTES}$"):
            await worker.ask(Job("regex", "flood", None))
        await worker.end()
        assert not worker.alive

    asyncio.run(main())
