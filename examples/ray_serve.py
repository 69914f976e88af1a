"""The server behind Ray Serve: each replica starts one and passes requests on as they are.

pip install 'ray[serve]' httpx           # beside this project, or with LMI=/path/to/lmi
MODEL=examples/shapes serve run examples.ray_serve:app
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess

import httpx
from ray import serve
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

_OF_A_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "host"}


def started(model: str, flags: tuple[str, ...]) -> tuple[subprocess.Popen[bytes], int]:
    """Return a server that begins to load the model, and its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [os.environ.get("LMI", "lmi"), "serve", model, "--port", str(port), *flags]
    return subprocess.Popen(command), port


@serve.deployment(
    max_ongoing_requests=1256,  # max_rolling_batch_size plus job_queue_size: the server refuses more
    health_check_timeout_s=5,
    graceful_shutdown_timeout_s=40,
    ray_actor_options={"num_cpus": 1},  # "num_gpus": 1 gives each replica one GPU
)
class Lmi:
    async def __init__(self, model: str, *flags: str) -> None:
        self._process, port = started(model, flags)
        self._client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None)
        while not await self._ready():
            if self._process.poll() is not None:
                raise RuntimeError("the server has ended; its log says why")
            await asyncio.sleep(0.5)

    async def __call__(self, request: Request) -> Response:
        query = f"?{request.url.query}" if request.url.query else ""
        headers = {name: value for name, value in request.headers.items() if name not in _OF_A_CONNECTION}
        passed = self._client.build_request(
            request.method, request.url.path + query, headers=headers, content=await request.body()
        )
        reply = await self._client.send(passed, stream=True)
        told = {name: value for name, value in reply.headers.items() if name not in _OF_A_CONNECTION}
        return StreamingResponse(reply.aiter_raw(), reply.status_code, told, background=BackgroundTask(reply.aclose))

    async def check_health(self) -> None:
        if not await self._ready():
            raise RuntimeError("/ping is not 200")

    def __del__(self) -> None:
        self._process.terminate()  # running requests finish, within drain_timeout
        self._process.wait()

    async def _ready(self) -> bool:
        try:
            return (await self._client.get("/ping", timeout=5)).status_code == 200
        except httpx.HTTPError:
            return False


app = Lmi.bind(os.environ.get("MODEL", "examples/shapes"))
