"""Print the files of ours that one streamed chat with a new image enters: `python bench/files_entered.py`.

A profiler in the server and its children notes each call while the chat lasts; what timers call counts, too.
"""

import base64
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = tuple(f"{ROOT}/{name}/" for name in ("container", "handlers", "engine", "processes", "properties"))


def run(folder: str, module: str, *arguments: str) -> None:
    sys.path[0], sys.argv = str(ROOT), [module, *arguments]
    import processes.child

    sink = os.open(f"{folder}/{module}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(frame, event, _):
        if event == "call" and (name := frame.f_code.co_filename).startswith(OURS):
            os.write(sink, f"{time.monotonic()} {name.removeprefix(f'{ROOT}/')}\n".encode())

    processes.child.child_command = lambda *given: [sys.executable, __file__, folder, *given]
    threading.setprofile(note)
    sys.setprofile(note)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def measure(folder: str) -> None:
    command = [sys.executable, __file__, folder, "container", "serve", f"{ROOT}/examples/shapes", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        log = [next(line for line in server.stdout if word in line) for word in ("listening", "ready after")]
        url = f"http://{log[0].split('listening on ')[1].split()[0]}/v1/chat/completions"
        for name in ("black-cross.jpg", "orange-star-and-blue-square.jpg"):
            image = base64.b64encode((ROOT / "examples/shapes/pictures" / name).read_bytes()).decode()
            content = [{"type": "image_url", "image_url": f"data:image/jpeg;base64,{image}"}]
            body = {"messages": [{"role": "user", "content": content}], "stream": True, "max_tokens": 8}
            start, _ = time.monotonic(), urllib.request.urlopen(url, json.dumps(body).encode(), 60).read()
            end = time.monotonic()
        server.terminate()
        server.communicate()
    for process in sorted(Path(folder).iterdir()):
        calls = [line.split() for line in process.read_text().splitlines()]
        files = sorted({name for moment, name in calls if start <= float(moment) <= end})
        print(f"{process.name}: {len(files)}", *files, sep="\n  ")


with tempfile.TemporaryDirectory() as temporary:
    run(*sys.argv[1:]) if len(sys.argv) > 1 else measure(temporary)
