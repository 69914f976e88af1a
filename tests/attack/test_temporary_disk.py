"""A temporary folder without any space: a server that serves goes on serving, and a download says what is wrong.

A start writes there too; Python chooses the next usable folder then (TMPDIR, /tmp, /var/tmp, ...).
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.support.backend import BACK, VLLM
from tests.support.live import LiveServer, chat_body, data_url
from tests.support.shapes import SHAPES

pytestmark = pytest.mark.skipif(VLLM, reason="where our own code writes does not depend on the engine")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB and 64 files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=64", "tmpfs", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """To the last byte and, where they are counted, the last file."""
    with contextlib.suppress(OSError), (folder / "full").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with pytest.raises(OSError, match="No space"):
        (folder / "more").write_bytes(b"x")


def test_a_server_whose_temporary_folder_fills_goes_on(disk: Path) -> None:
    """Images, new grammars and a new engine process included."""
    with LiveServer(SHAPES, TMPDIR=str(disk)) as server:
        fill(disk)
        image = data_url(Image.new("RGB", (64, 64), "red"))
        assert server.chat(image, "What is this?").status_code == 200
        body = chat_body("hello", response_format={"type": "json_object"}, max_tokens=2)
        assert server.http.post("/v1/chat/completions", json=body).status_code == 200
        (engine,) = server.engines
        engine.kill()
        server.wait_for(BACK)
        assert server.chat(image, "What is this?").status_code == 200
        assert server.http.get("/health").status_code == 200


def test_a_download_says_that_there_is_no_space(disk: Path) -> None:
    from handlers.artefacts import ArtefactError
    from handlers.artefacts.fetch import download_root

    for number in range(1 << 16):  # until there is no room for another directory
        try:
            (disk / f"{number}").mkdir()
        except OSError:
            break
    with pytest.raises(ArtefactError, match=r"No space left on device; set SERVING_DOWNLOAD_DIR"):
        download_root(str(disk / "new" / "models"))
