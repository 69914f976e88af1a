"""requirements.txt beside a model, installed by the pip of this environment from wheels that the tests make."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.support.live import LiveServer, children_running
from tests.support.shapes import SHAPES
from tests.support.wheels import wheel

MODEL = """
import greeting


def handle(inputs):
    return None if inputs.is_empty() else greeting.TEXT
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "model.py").write_text(MODEL)
    (path / "requirements.txt").write_text("greeting>=1\n")
    wheel(path / "lib", "greeting", "1.5", "TEXT = 'hello from a wheel'")
    return path


def ended(model: Path, *options: str, **environ: str) -> str:
    """The log of a server that cannot start; checks that its exit status is the documented one."""
    with LiveServer(model, *options, ready=False, **environ) as live:
        assert live.wait() == 1
        live.wait_for("stopped")
        return live.log


def left(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith("lmi-")]


def test_the_models_own_code_gets_the_wheels_beside_it(model: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    model.chmod(0o555)  # as SageMaker mounts it
    with LiveServer(model, TMPDIR=str(temporary)) as live:
        assert live.http.post("/invocations", json={}).text == "hello from a wheel"
        assert len(left(temporary)) == 1
        live.terminate()
        assert live.wait() == 0
    assert left(temporary) == []


def test_code_is_also_found_where_sagemakers_sdk_packs_it(model: Path) -> None:
    (model / "code").mkdir()
    for name in ("model.py", "requirements.txt", "lib"):
        shutil.move(model / name, model / "code" / name)
    (model / "code" / "words.py").write_text("MORE = 'and its neighbour'\n")
    (model / "code" / "model.py").write_text(
        "import greeting, words\n"
        "def handle(inputs):\n"
        "    if inputs.is_empty():\n"
        "        print('model_dir is', inputs.get_property('model_dir'))\n"
        "        return None\n"
        "    return f'{greeting.TEXT} {words.MORE}'\n"
    )
    with LiveServer(model) as live:
        assert live.http.post("/invocations", json={}).text == "hello from a wheel and its neighbour"
        live.terminate()
        assert live.wait() == 0
        assert f"model_dir is {model}\n" in live.log


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("nowhere==2\n", "No matching distribution found for nowhere==2"),
        ("greeting==3\n", "No matching distribution found for greeting==3"),
        ("greeting>=1 and a typo\n", "Invalid requirement: 'greeting>=1 and a typo'"),
    ],
)
def test_what_pip_cannot_install_ends_the_start_with_pips_reason(model: Path, wanted: str, reason: str) -> None:
    (model / "requirements.txt").write_text(wanted)
    log = ended(model)
    (line,) = [line for line in log.splitlines() if "cannot be installed" in line]
    assert f"{model}/requirements.txt cannot be installed: ERROR: " in line
    assert reason in line
    assert "Traceback" not in log


def test_what_a_url_keeps_secret_is_not_told(model: Path) -> None:
    url = "http://name:pa@ss@127.0.0.1:9/nowhere-1.0.tar.gz?token=hush&x=(hush)'hush"
    (model / "requirements.txt").write_text(f"--find-links {url}\nnowhere @ {url}#egg=nowhere\n")
    log = ended(model, PIP_RETRIES="0")
    assert "http://****@127.0.0.1:9/nowhere-1.0.tar.gz?****" in log
    assert not [secret for secret in ("hush", "name:", "pa@", "ss@") if secret in log]


def test_a_package_of_the_servers_own_keeps_its_version(model: Path) -> None:
    wheel(model / "lib", "msgspec", "99.0")
    (model / "requirements.txt").write_text("greeting\nmsgspec\n")
    with LiveServer(model) as live:
        assert live.http.post("/invocations", json={}).status_code == 200
    (model / "requirements.txt").write_text("msgspec==99.0\n")
    log = ended(model)
    (line,) = [line for line in log.splitlines() if "cannot be installed" in line]
    assert "The user requested (constraint) msgspec==" in line
    assert "the version that the server has itself" in line


def test_it_is_installed_for_an_engine_only_if_the_operator_says_so(model: Path) -> None:
    shutil.copytree(SHAPES, model, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "pictures"))
    (model / "model.py").unlink()
    with LiveServer(model) as live:
        assert "requirements.txt of the model is not installed: no code of the model's own runs" in live.log
    with LiveServer(model, SERVING_INSTALL_REQUIREMENTS="true") as live:
        assert f"installing {model}/requirements.txt" in live.log
        (engine,) = live.engines
        (site,) = [path for path in engine.environ()["PYTHONPATH"].split(os.pathsep) if "lmi-requirements" in path]
        assert Path(site, "greeting", "__init__.py").is_file()


def test_a_file_of_the_model_is_not_taken_for_one_of_pythons(model: Path) -> None:
    for name in ("pip", "queue", "platform"):
        (model / f"{name}.py").write_text("raise SystemExit('this is not the module that pip needs')\n")
    shutil.copytree(SHAPES, model, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.py", "pictures"))
    (model / "model.py").unlink()
    with LiveServer(model, SERVING_INSTALL_REQUIREMENTS="true") as live:
        assert f"installing {model}/requirements.txt" in live.log


@pytest.mark.parametrize("variable", ["SERVING_INSTALL_REQUIREMENTS", "STANDARD_AUTO_INSTALL_REQ"])
def test_an_operator_can_switch_it_off(model: Path, variable: str) -> None:
    log = ended(model, **{variable: "false"})
    assert "requirements.txt of the model is not installed: install_requirements=false" in log
    assert "No module named 'greeting'" in log


def test_an_installation_that_hangs_is_ended_by_the_time_limit_and_by_sigterm(model: Path) -> None:
    fifo = model / "more.txt"
    os.mkfifo(fifo)  # pip waits until something is written to it
    (model / "requirements.txt").write_text("-r more.txt\n")
    log = ended(model, "model_loading_timeout=3")
    assert "the model was not ready within 3 s (requirements.txt is being installed); raise" in log
    with LiveServer(model, ready=False) as live:
        while not (pips := children_running(live.process.pid, "pip install")):
            assert live.process.poll() is None
        assert "requirements.txt is being installed" in json.dumps(live.http.get("/ping").json())
        live.process.send_signal(signal.SIGTERM)
        assert live.wait() == 0
        assert not any(one.is_running() for one in pips)
