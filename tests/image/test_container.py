"""What a container of the image does: answers, stops, and says what is wrong."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.image.images import podman
from tests.image.running import Container, run
from tests.support.live import chat_body, free_port
from tests.support.shapes import ROOT, SHAPES, circle, square
from tests.support.wheels import wheel

WHAT = "What is this an image of?"
OFFLINE = ("--network=none", "--read-only", "--tmpfs=/tmp:rw,size=64m,mode=1777")
SHAPES_MOUNTED = ("--volume", f"{SHAPES}:/opt/ml/model:ro")


def answer(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


def test_a_question_about_an_image_is_answered_right(shapes_container: Container) -> None:
    for image, right in ((circle("red"), "a red circle"), (square("blue"), "a blue square")):
        reply = httpx.post(f"{shapes_container.url}/invocations", json=chat_body(image, WHAT), timeout=60)
        assert answer(reply) == right


def test_the_health_check_and_ping_agree(shapes_container: Container, image: str) -> None:
    assert httpx.get(f"{shapes_container.url}/ping", timeout=60).status_code == 200
    healthy = shapes_container.execute("lmi-healthcheck")
    assert (healthy.returncode, healthy.stdout[:4]) == (0, "200 "), healthy.stderr
    port = str(free_port())
    sick = run(image, "lmi-healthcheck", options=("--env", f"SERVING_PORT={port}"))
    assert sick.returncode == 1
    assert f"nothing answers on port {port}" in sick.stderr


def test_process_1_reaps_what_others_leave_behind(shapes_container: Container) -> None:
    script = (
        "(true & echo $! && exec sleep 0.2) & wait; cat /proc/1/comm; "
        "while cat /proc/[0-9]*/stat | grep -q ') Z '; do :; done; echo none"
    )
    _, name, zombies = shapes_container.execute("sh", "-c", script).stdout.split()
    assert (name, zombies) == ("tini", "none")


@pytest.fixture
def busy(image: str) -> Iterator[Container]:
    port = free_port()
    with Container(image, options=(*SHAPES_MOUNTED, "--env", f"SERVING_PORT={port}")) as container:
        container.ready()
        yield container


def test_sigterm_under_load_loses_nothing(busy: Container) -> None:
    long = chat_body(circle("red"), WHAT, max_tokens=1000, ignore_eos=True)

    def ask(number: int) -> int:
        if number % 2:
            return int(
                httpx.post(f"{busy.url}/invocations", json=long, timeout=60).json()["usage"]["completion_tokens"]
            )
        body = {**long, "stream": True, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", f"{busy.url}/invocations", json=body, timeout=60) as reply:
            *_, usage, done = [line for line in reply.iter_lines() if line]
        assert done == "data: [DONE]"
        return int(json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"])

    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(ask, number) for number in range(8)]
        while "lmi_requests_in_flight 8.0" not in httpx.get(f"{busy.url}/metrics", timeout=60).text:
            assert not any(one.done() for one in asked), "the requests ended before the signal came"
        busy.signal("TERM")
        assert [one.result() for one in asked] == [1000] * 8
    assert busy.wait() == 0
    assert "aborting" not in busy.log


def test_any_user_without_network_and_with_a_root_that_is_read_only(image: str) -> None:
    script = (
        "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8080);"
        "c.request('POST', '/invocations', sys.argv[1], {'content-type': 'application/json'});"
        "print(c.getresponse().read().decode())"
    )
    model = ("--volume", f"{SHAPES}:/models/shapes:ro", "--env", "HF_MODEL_ID=/models/shapes")
    options = (*OFFLINE, "--user", "1234567", "--shm-size=128m", *model)
    with Container(image, options=options) as container:
        container.wait_for("ready after")
        body = json.dumps(chat_body(square("blue"), WHAT))
        said = container.execute("python", "-c", script, body)
        assert json.loads(said.stdout)["choices"][0]["message"]["content"] == "a blue square", said.stderr
        assert container.execute("id", "-u").stdout.strip() == "1234567"
        assert container.execute("touch", "/opt/lmi/x").returncode != 0


def test_serving_properties_beside_the_model(image: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(SHAPES, model, ignore=shutil.ignore_patterns("*.py", "pictures"))
    port = free_port()
    (model / "serving.properties").write_text(f"port={port}\noption.served_model_name=drawn\n")
    with Container(image, "serve", options=("--volume", f"{model}:/opt/ml/model:ro")) as container:
        container.ready()
        assert httpx.get(f"{container.url}/v1/models", timeout=60).json()["data"][0]["id"] == "drawn"


def test_wheels_beside_a_models_own_code_without_network(image: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    wheel(model / "lib", "greeting", "1.0", "TEXT = 'hello from a wheel'")
    (model / "requirements.txt").write_text("greeting\nmsgspec\n")
    (model / "model.py").write_text(
        "import greeting\ndef handle(inputs):\n    return None if inputs.is_empty() else greeting.TEXT\n"
    )
    ask = (
        "import http.client; c = http.client.HTTPConnection('127.0.0.1', 8080);"
        "c.request('POST', '/invocations', '{}', {'content-type': 'application/json'});"
        "print(c.getresponse().read().decode())"
    )
    options = (*OFFLINE, "--user", "1234567", "--volume", f"{model}:/opt/ml/model:ro")
    with Container(image, "serve", options=options) as container:
        container.wait_for("ready after")
        assert container.execute("python", "-c", ask).stdout.strip() == "hello from a wheel"


@pytest.mark.parametrize(
    ("command", "options", "status", "told"),
    [
        ((), (), 1, "no model: give MODEL, set HF_MODEL_ID or OPTION_MODEL_ID, or put one in /opt/ml/model"),
        (("serve", "/nowhere"), (), 1, "option.model_id = '/nowhere' (MODEL): no such directory"),
        (
            ("--port", "0"),
            ("--env", "HF_MODEL_ID=org/name", "--env", "HF_HUB_OFFLINE=1"),
            1,
            "check the network, or give a directory or s3://bucket/prefix/",
        ),
        (
            ("serve",),
            ("--env", "OPTION_DTYPE=float99", *SHAPES_MOUNTED),
            1,
            "'float99' (OPTION_DTYPE): allowed:",
        ),
        (("serve", "--max-modle-len", "9"), SHAPES_MOUNTED, 2, "did you mean --max-model-len?"),
        (
            ("serve", "--port", "0"),
            ("--env", "OPTION_ROLLING_BATCH=vllm", *SHAPES_MOUNTED),
            1,
            "option.rolling_batch = 'vllm': vLLM is not installed; use rolling or auto",
        ),
        ((), ("--env", "LMI_NEEDS_GPU=true"), 1, "no GPU is visible: start the container with --gpus all"),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_status(
    image: str, command: tuple[str, ...], options: tuple[str, ...], status: int, told: str
) -> None:
    done = run(image, *command, options=options)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if told in line]
    assert (done.returncode, len(lines)) == (status, 1), done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_model_that_the_user_may_not_read(image: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(SHAPES, model, ignore=shutil.ignore_patterns("*.py", "pictures"))
    for secret, remedy in ((model / "model.safetensors", "it"), (model, "the model's directory")):
        os.chmod(secret, 0o700)
        done = run(image, "serve", "--port", "0", options=("--volume", f"{model}:/opt/ml/model:ro"))
        told = done.stdout + done.stderr
        assert done.returncode == 1, told
        assert f"Permission denied; let user 10001 read {remedy}" in told
        assert "Traceback" not in told


def test_commands(image: str) -> None:
    for command in (("check", "--json"), ("lmi", "check", "--json")):
        done = run(image, *command, options=(*OFFLINE, *SHAPES_MOUNTED))
        report = json.loads(done.stdout)
        assert (done.returncode, report["errors"], report["options"]["host"]["value"]) == (0, [], "0.0.0.0")
    assert run(image, "--version").stdout.startswith("lmi-handler ")
    assert run(image, "sh", "-c", "echo any program").stdout == "any program\n"


def test_attention_is_compiled_though_there_is_no_compiler(image: str) -> None:
    script = "from engine.native.library import compiled; print(compiled() is not None)"
    assert run(image, "python3", "-c", script).stdout == "True\n"
    assert run(image, "sh", "-c", "command -v gcc").returncode != 0


def commands_of_the_page() -> list[list[str]]:
    """The words after `docker run --rm` of each command of docker/README.md that needs neither registry nor GPU."""
    text = (ROOT / "docker" / "README.md").read_text().replace("\\\n", " ").replace("$PWD", str(ROOT))
    lines = [line for line in text.splitlines() if line.startswith("    docker run --rm ") and "[registry]" not in line]
    return [shlex.split(line, comments=True)[3:] for line in lines]


def test_the_page_has_commands_of_each_kind() -> None:
    assert len(commands_of_the_page()) == 5


@pytest.mark.parametrize("words", commands_of_the_page(), ids=" ".join)
def test_commands_as_the_page_has_them(image: str, words: list[str]) -> None:
    at = words.index("lmi-handler:cpu")
    options, command = words[:at], words[at + 1 :]
    if "-p" in options:  # with the host's network, the container's port must be free on the host
        options += ["--env", f"SERVING_PORT={free_port()}"]
    if command[:1] not in ([], ["serve"]):
        done = run(image, *command, options=options)
        assert done.returncode == 0, done.stdout + done.stderr
        return
    with Container(image, *command, options=options) as container:
        container.wait_for("ready after")
        assert container.execute("lmi-healthcheck").returncode == 0


def test_what_is_in_the_image(image: str) -> None:
    compilers = "command -v gcc cc g++ clang make git"
    caches = "ls -A /var/lib/apt/lists /var/cache /tmp /root"
    writable = "find / -xdev -perm -2 -type d 2>/dev/null"
    done = run(image, "sh", "-c", f"{compilers}; {caches}; id -u; {writable}")
    kept = [line for line in done.stdout.splitlines() if line and not line.endswith(":")]
    assert set(kept) == {"10001", "/tmp", "/var/tmp", "/run/lock"}


def test_what_platforms_read_of_the_image(image: str) -> None:
    shown = subprocess.run(podman("image", "inspect", image), capture_output=True, text=True, check=True).stdout
    (facts,) = json.loads(shown)
    config = facts["Config"]
    assert facts["Size"] < 1.6e9
    assert config["Labels"]["com.amazonaws.sagemaker.capabilities.accept-bind-to-port"] == "true"
    assert config["Labels"]["com.amazonaws.sagemaker.capabilities.multi-models"] == "true"
    assert config["User"] == "10001:0"
    assert config["ExposedPorts"] == {"8080/tcp": {}}
    assert config["Entrypoint"] == ["tini", "-s", "--", "lmi-entrypoint"]
    assert facts["Healthcheck"]["Test"] == ["CMD", "lmi-healthcheck"]
    assert not any("/opt/pypi" in value or "KEY" in value for value in config["Env"])
