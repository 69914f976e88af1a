"""What people see while a model loads."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.live import LiveServer
from tests.support.shapes import SHAPES

SLOWLY = """
import os, time
import safetensors
open_file = safetensors.safe_open

def safe_open(file, framework=None, *more, **options):
    opened = open_file(file, framework, *more, **options)
    if framework == "pt":
        opened.keys()
        while not os.path.exists({go!r}):
            time.sleep(0.05)
    return opened

safetensors.safe_open = safe_open
"""
"""Has every Python process below the server wait once it has mapped weights."""


def test_it_is_told_how_much_of_the_weights_has_been_read(tmp_path: Path) -> None:
    go = tmp_path / "go"
    (tmp_path / "sitecustomize.py").write_text(SLOWLY.format(go=str(go)))
    with LiveServer(SHAPES, ready=False, PYTHONPATH=str(tmp_path)) as server:
        told = r"the model is loading: weights \d\.\d MiB of 4\.2 MiB, \d+\.\d MiB/s(, .+ left)?"
        server.wait_for(told)  # every 10 s
        ping = server.http.get("/ping")
        assert ping.status_code == 503
        assert re.fullmatch(told, ping.json()["reason"]), ping.text
        go.touch()
        server.wait_for("ready after")
        assert server.http.get("/ping").status_code == 200
