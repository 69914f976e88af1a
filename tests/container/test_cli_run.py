"""`lmi run`: flags in Aphrodite's and vLLM's manner, keys, and the documentation's snippets with another model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from container.access import Keys
from container.cli import main
from container.flags import FlagError, read_flags
from handlers.backends.rolling.engine import RollingEngine
from handlers.errors import Unavailable
from handlers.offline.options import configure
from properties.configuration import resolve
from properties.settings import Settings
from tests.support.live import LiveServer, message
from tests.support.shapes import IMAGES, ROOT, SHAPES

OWN = ("--json", "--help", "-h")


def options(*arguments: str, more: tuple[str, ...] = ()) -> list[str]:
    return read_flags(arguments, OWN, more).options


class TestFlags:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--max-model-len", "4096"], {"max_model_len": 4096}),
            (["--max_model_len=4096"], {"max_model_len": 4096}),
            (["--tensor-parallel-size", "2"], {"tensor_parallel_degree": 2}),
            (["-tp", "2", "-pp=3"], {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 3}),
            (["--gpu-memory-utilization", "0.5", "--dtype", "half"], {"gpu_memory_utilization": 0.5}),
            (["--trust-remote-code"], {"trust_remote_code": True}),
            (["--trust-remote-code", "--seed", "3"], {"trust_remote_code": True, "seed": 3}),
            (["--trust-remote-code", "false"], {"trust_remote_code": False}),
            (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
            (["--limit-mm-per-prompt", '{"image": 4}'], {"limit_mm_per_prompt": {"image": 4}}),
            (["--limit-mm-per-prompt", "image=2,video=0"], {"limit_mm_per_prompt": {"image": 2, "video": 0}}),
            (["--limit-mm-per-prompt", "image=2", "video=0"], {"limit_mm_per_prompt": {"image": 2, "video": 0}}),
            (["--limit-mm-per-prompt.image", "3"], {"limit_mm_per_prompt": {"image": 3}}),
            (["--mm-processor-kwargs.a.b", "3", "--mm-processor-kwargs.c", "d"],
             {"mm_processor_kwargs": {"a": {"b": 3}, "c": "d"}}),
            (["--served-model-name", "a"], {"served_model_name": ["a"]}),
            (["--served-model-name", "a", "b,c"], {"served_model_name": ["a", "b,c"]}),
            (["--chat-template", "{{ messages }}"], {"chat_template": "{{ messages }}"}),
            (["--host", "0.0.0.0", "--port", "8000"], {"host": "0.0.0.0", "port": 8000}),
            (["--image-input-shape", "1,3,336,336"], {"image_input_shape": [1, 3, 336, 336]}),
        ],
    )  # fmt: skip
    def test_become_options(self, arguments: list[str], expected: dict[str, Any]) -> None:
        found = read_flags(["MODEL", *arguments], OWN)
        assert found.rest == ["MODEL"]
        settings = resolve(model="org/model", environ={}, options=found.options).settings
        for name, value in expected.items():
            got = getattr(settings, name)
            got = {key: got[key] for key in value} if isinstance(value, dict) and "a" not in value else got
            assert got == value, name

    def test_leave_other_arguments_in_order(self) -> None:
        found = read_flags(["--dtype", "float32", "MODEL", "--option", "port=3", "--json", "--", "--dtype"], OWN)
        assert found.rest == ["MODEL", "--option", "port=3", "--json", "--", "--dtype"]
        assert found.options == ["--dtype=float32"]

    def test_a_model_may_be_a_flag_or_follow_one(self) -> None:
        found = read_flags(["--served-model-name", "a", "MODEL"], OWN)
        assert (found.rest, found.options) == (["MODEL"], ["--served-model-name=a"])
        assert options("--model", "org/x", "--served-model-name", "a", "b") == [
            "--model-id=org/x",
            '--served-model-name=["a", "b"]',
        ]

    def test_a_template_is_looked_for_here_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "llava.jinja").write_text("{{ messages }}")
        assert options("--chat-template", "llava.jinja") == [f"--chat-template={tmp_path / 'llava.jinja'}"]
        for other in ("other.jinja", "{{ messages }}", "\0", "x" * 5000):
            assert options("--chat-template", other) == [f"--chat-template={other}"]

    def test_secrets_are_kept_apart(self) -> None:
        given = [
            "MODEL", "--api-key", "one", "two", "--option", "hf_token=three", "--dtype", "half", "--api-keys=four",
        ]  # fmt: skip
        found = read_flags(given, OWN)
        assert found.secret == ['--api-key=["one", "two"]', "hf_token=three", "--api-key=four"]
        assert found.rest == ["MODEL"]

    def test_a_key_before_the_model_is_one_key(self) -> None:
        found = read_flags(["--api-key", "one", "MODEL"], OWN)
        assert (found.secret, found.rest) == (["--api-key=one"], ["MODEL"])

    def test_flags_that_mean_nothing_here_are_said(self) -> None:
        found = read_flags(["M", "--disable-log-requests", "--swap-space", "4", "--dtype", "auto"], OWN)
        assert found.warnings == ["--disable-log-requests has no effect here", "--swap-space has no effect here"]
        assert (found.rest, found.options) == (["M"], ["--dtype=auto"])

    def test_a_folder_of_images_has_no_effect_and_that_is_said(self) -> None:
        given = options("M", "--allowed-local-media-path", "/data")
        (warning,) = resolve(model="org/model", environ={}, options=given).warnings
        assert "images are never read from files: send them as data: URLs" in str(warning)

    def test_arguments_of_vllm_pass(self) -> None:
        more = ("long_prefill_token_threshold", "enable_sleep_mode")
        assert options("M", "--enable-sleep-mode", "--long-prefill-token-threshold", "4", more=more) == [
            "--enable-sleep-mode=true",
            "--long-prefill-token-threshold=4",
        ]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--max-modle-len", "3"], "unknown flag --max-modle-len; did you mean --max-model-len"),
            (["--api-kye=secret"], "unknown flag --api-kye; did you mean --api-key"),
            (["--launch-kobold-api"], "unknown flag --launch-kobold-api;"),
            (["--ssl-keyfile", "key.pem"], "unknown flag --ssl-keyfile; the port speaks plain HTTP"),
            (["--ssl-certfile", "cert.pem"], "unknown flag --ssl-certfile; the port speaks plain HTTP"),
            (["--hf-overrides", "{}"], "--hf-overrides; it is a flag of vLLM, which is not installed here"),
            (["--admin-key", "secret"], "unknown flag --admin-key"),
            (["--config", "lmi.yaml"], "unknown flag --config"),
            (["--max-batch-total-tokens", "9"], "unknown flag --max-batch-total-tokens"),
            (["--max-model-len"], "--max-model-len needs a value"),
            (["--max-model-len", "--dtype", "half"], "--max-model-len needs a value"),
            (["--option"], "--option needs a value"),
            (["--mm-processor-kwargs.a", "1", "--mm-processor-kwargs.a.b", "2"], "the entry 'a'"),
        ],
    )
    def test_what_is_wrong_is_said(self, arguments: list[str], said: str) -> None:
        with pytest.raises(FlagError, match=said) as caught:
            read_flags(["MODEL", *arguments], OWN)
        assert "secret" not in str(caught.value)


def test_a_template_is_never_fetched(capsys: pytest.CaptureFixture[str]) -> None:
    address = "https://templates.example/llava.jinja"
    assert main(["check", str(SHAPES), "--chat-template", address, "--json"]) == 1
    (error,) = json.loads(capsys.readouterr().out)["errors"]
    assert error.startswith(f"option.chat_template = '{address}'")
    assert "no such file" in error


class TestKeys:
    @pytest.mark.parametrize(
        ("key", "sent", "admitted"),
        [
            (None, None, True),
            ("k", None, False),
            ("k", "Bearer k", True),
            ("k", "bearer  k ", True),
            ("k", "Basic k", False),
            ("k", "Bearer", False),
            ("k", "Bearer kk", False),
            ("kéy", "Bearer " + "kéy".encode().decode("latin-1"), True),
            ("a,b", "Bearer a", False),
            ("a,b", "Bearer a,b", True),
            ('["a", "b"]', "Bearer b", True),
            ('["a", "b"]', "Bearer c", False),
            ('["a", ""]', "Bearer ", False),
            ("[]", "Bearer x", False),
            ("12", "Bearer 12", True),
        ],
    )
    def test_admit(self, key: str | None, sent: str | None, admitted: bool) -> None:
        keys = Keys(Settings(api_key=key).api_key)
        assert keys.admit({} if sent is None else {"authorization": sent}) is admitted


@pytest.mark.parametrize(
    "name", ["SERVING_API_KEY", "OPTION_API_KEY", "VLLM_API_KEY", "APHRODITE_API_KEY", "file", "option", "flag"]
)
def test_a_key_counts_wherever_it_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    given: list[str] = []
    environ = {}
    if name == "file":
        (tmp_path / "serving.properties").write_text("option.api_key=k\n")
    elif name == "option":
        given = ["option.api_key=k"]
    elif name == "flag":
        given = read_flags(["--api-key", "k"], OWN).secret
    else:
        environ = {name: "k"}
    found = resolve(model=str(tmp_path), environ=environ, options=given)
    assert found.settings.api_key is not None
    assert found.settings.api_key.get_secret_value() == "k"
    assert found.warnings == []
    assert "k" not in str(found.sources["api_key"].raw)


SHOW = """
import sys
import container.server
def show(configuration, build):
    settings = configuration.settings
    sys.stderr.write(f"{{settings.host}} {{settings.port}}")
    return 0
container.server.serve = show
from container.cli import {main}
raise SystemExit({main}())
"""


def started(command: str, *arguments: str, **environ: str) -> str:
    """Host and port as the command would listen."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", SHOW.format(main=command), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr


def test_run_listens_on_aphrodites_port_unless_told_otherwise() -> None:
    assert started("main", "run", str(SHAPES)) == "127.0.0.1 2242"
    assert started("main", "serve", str(SHAPES)) == "127.0.0.1 8080"
    assert started("serve_main", str(SHAPES), "--max-model-len", "64") == "0.0.0.0 8080"
    assert started("main", "run", str(SHAPES), SERVING_PORT="81") == "127.0.0.1 81"
    assert started("main", "run", str(SHAPES), "--port", "82", "--host", "::1") == "::1 82"


PAGE = """
    --model llava-hf/llava-1.5-7b-hf
    --image-input-type pixel_values
    --image-token-id 32000
    --image-input-shape 1,3,336,336
    --image-feature-size 576
    --chat-template template_llava.jinja
"""
"""What vLLM's page on vision models wrote behind `python -m vllm.entrypoints.openai.api_server`, from 0.4 to 0.5."""


def resolved(command: str) -> Settings:
    found = read_flags(command.split(), OWN)
    return resolve(model=None, environ={}, options=[*found.options, *found.secret]).settings


def test_the_command_of_vllms_old_page_with_another_programs_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("template_llava.jinja").write_text("{{ messages }}")
    settings = resolved(PAGE)
    assert settings.model_id == "llava-hf/llava-1.5-7b-hf"
    assert (settings.image_input_type, settings.image_token_id) == ("pixel_values", 32_000)
    assert (settings.image_input_shape, settings.image_feature_size) == ([1, 3, 336, 336], 576)
    assert settings.chat_template == str(tmp_path / "template_llava.jinja")
    # A command line that its users have written in earnest.
    settings = resolved(
        "--port=5063 --host=0.0.0.0 --model microsoft/Phi-3-vision-128k-instruct --tensor-parallel-size=1 --seed 1234 "
        "--max-num-batched-tokens=8192 --trust-remote-code --max-log-len=100 --image-input-type=pixel_values "
        "--image-token-id=32044 --image-input-shape=1,3,1008,1344 --image-feature-size=1921 --download-dir=/tmp/hub "
        "--disable-image-processor --dtype bfloat16 --max-model-len 4096 --enforce-eager --disable-log-requests "
        "--gpu-memory-utilization 0.95 --max-num-seqs 32"
    )
    assert (settings.host, settings.port, settings.seed) == ("0.0.0.0", 5063, 1234)
    assert (settings.image_input_shape, settings.image_feature_size) == ([1, 3, 1008, 1344], 1921)
    assert (settings.max_model_len, settings.max_rolling_batch_size) == (4096, 32)


def test_the_table_of_the_offline_page_is_true() -> None:
    page = (ROOT / "docs" / "offline.md").read_text()
    rows = re.findall(r"^\| `(--[^`]+)` \| ([^|]+) \|$", page, re.MULTILINE)
    assert {row.split()[0] for row in PAGE.strip().splitlines()} < {flag.split()[0] for flag, _ in rows}
    for flag, here in rows:
        found = read_flags(flag.split(), OWN)
        name = flag.split()[0]
        if here.startswith("no effect"):
            assert (found.options, found.rest, found.warnings) == ([], [], [f"{name} has no effect here"])
        else:
            assert here.startswith("the same")
            assert not found.warnings
            assert len(found.options) == 1
    assert "`lmi run --host 0.0.0.0 --port 8000 …`" in page


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "container.cli", *arguments], capture_output=True, text=True, check=False
    )


def test_a_bad_command_line_ends_at_once() -> None:
    unknown = run("run", str(SHAPES), "--max-modle-len", "3")
    assert unknown.returncode == 2
    assert "did you mean --max-model-len?" in unknown.stderr
    bad = run("run", str(SHAPES), "--max-model-len", "many", "--port", "0")
    assert bad.returncode == 1
    assert "option.max_model_len = 'many' (--max-model-len): allowed: a whole number from 1" in bad.stderr


WRONG = {
    "--image-input-type": ("image_features", "option.image_input_type is image_features, but the model's is pixel_"),
    "--image-token-id": ("32000", "option.image_token_id is 32000, but the model's is 3:"),
    "--image-input-shape": ("1,3,336,336", "option.image_input_shape is 1,3,336,336, but the model's is 1,3,96,96:"),
    "--image-feature-size": ("576", "option.image_feature_size is 576, but the model's is 64:"),
}  # fmt: skip


def test_what_the_model_contradicts_is_an_error_with_both_values(capsys: pytest.CaptureFixture[str]) -> None:
    given = [part for flag, (value, _) in WRONG.items() for part in (flag, value)]
    assert main(["check", str(SHAPES), *given, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    for (_, said), error in zip(WRONG.values(), report["errors"], strict=True):
        assert error.startswith(said)
    warnings = [warning for warning in report["warnings"] if "retired" in warning]
    assert len(warnings) == 4
    assert "--image-token-id" in "".join(warnings)


def test_such_a_model_is_not_loaded() -> None:
    configuration = configure(str(SHAPES), {"image_token_id": 5})
    with pytest.raises(Unavailable, match=r"option\.image_token_id is 5, but the model's is 3"):
        asyncio.run(RollingEngine.start(configuration, SHAPES))


KEY, OTHER_KEY = "sk-first-secret", "sk-second-secret"


@pytest.fixture(scope="module")
def images() -> Iterator[str]:
    """Where the repository's images can be fetched."""
    handler = partial(Quiet, directory=str(IMAGES))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    template = tmp_path_factory.mktemp("template") / "llava.jinja"
    template.write_text((SHAPES / "chat_template.jinja").read_text())
    flags = [
        "--chat-template", str(template), "--max-model-len", "2048", "--limit-mm-per-prompt", "image=2",
        "--served-model-name", "llava-hf/llava-1.5-7b-hf", "shapes", "--api-key", KEY, OTHER_KEY,
        "--image-fetch-allow-private", "127.0.0.1", "--dtype", "bfloat16", "--gpu-memory-utilization", "0.5",
        "--tensor-parallel-size", "1", "--disable-log-requests",
        "--image-input-type", "pixel_values", "--image-token-id", "3", "--image-input-shape", "1,3,96,96",
        "--image-feature-size", "64",
    ]  # fmt: skip
    with LiveServer(SHAPES, command="run", flags=flags) as live:
        live.http.headers["authorization"] = f"Bearer {KEY}"
        yield live


@pytest.fixture(scope="module")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=OTHER_KEY, max_retries=0)


def ask(client: openai.OpenAI, image: str, question: str = "What's in this image?", **fields: Any) -> str:
    """The body of Aphrodite's vision documentation."""
    chat_response = client.chat.completions.create(
        model="llava-hf/llava-1.5-7b-hf",
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": image}}],
            }
        ],
        **fields,
    )
    return chat_response.choices[0].message.content or ""


class TestServer:
    def test_the_documentations_client_gets_the_right_answer(self, client: openai.OpenAI, images: str) -> None:
        assert ask(client, f"{images}/red-circle.png", temperature=0) == "a red circle"
        assert [model.id for model in client.models.list()] == ["llava-hf/llava-1.5-7b-hf", "shapes"]

    def test_the_documentations_curl_gets_the_right_answer(self, server: LiveServer, images: str) -> None:
        body = {
            "model": "llava-hf/llava-1.5-7b-hf",
            "messages": [message("What's in this image?", f"{images}/green-triangle.png")],
            "temperature": 0,
        }
        command = [
            "curl", "-s", "-X", "POST", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json",
            "-H", f"Authorization: Bearer {KEY}", "-d", json.dumps(body),
        ]  # fmt: skip
        reply = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        assert reply["choices"][0]["message"]["content"] == "a green triangle"

    def test_without_a_key_only_health_and_metrics_answer(self, server: LiveServer) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as anybody:
            for path in ("/ping", "/health", "/metrics"):
                assert anybody.get(path).status_code == 200
            for method, path in (
                ("GET", "/v1/models"), ("GET", "/version"), ("GET", "/info"), ("POST", "/v1/chat/completions"),
                ("POST", "/v1/completions"), ("POST", "/invocations"), ("POST", "/generate"), ("POST", "/tokenize"),
                ("POST", "/"),
            ):  # fmt: skip
                refused = anybody.request(method, path, json={} if method == "POST" else None)
                assert refused.status_code == 401, path
                assert refused.headers["content-type"].startswith("application/json")
                wrong = {"authorization": f"Bearer {KEY}x"}
                assert anybody.request(method, path, headers=wrong).status_code == 401, path

    def test_the_client_without_the_key_is_told_so(self, server: LiveServer) -> None:
        stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"):
            stranger.models.list()

    def test_the_key_is_shown_nowhere(self, server: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
        (engine,) = server.engines
        for file in ("cmdline", "environ"):
            assert "-secret" not in Path(f"/proc/{engine.pid}/{file}").read_text()
        assert "-secret" not in server.log
        assert "secrets on the command line can be read by every user" in server.log
        main(["check", str(SHAPES), "--api-key", KEY])
        assert "-secret" not in "".join(capsys.readouterr())

    def test_what_the_flags_say_holds(self, server: LiveServer, client: openai.OpenAI, images: str) -> None:
        assert server.http.get("/v1/models").json()["data"][0]["max_model_len"] == 2048
        image = f"{images}/red-circle.png"
        three = server.http.post("/v1/chat/completions", json={"messages": [message(image, image, image, "x")]})
        assert three.status_code == 400
        assert "limit_mm_per_prompt" in three.json()["error"]["message"]
        assert server.log.count("is retired: the model now says so itself") == 4
        assert "--disable-log-requests has no effect here" in server.log

    def test_a_space_before_the_headers_colon_is_refused(self, server: LiveServer) -> None:
        """As one snippet prints it. RFC 9112, section 5.1, asks for a 400, and every server of that kind gives it."""
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(
                b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer " + KEY.encode() + b"\r\n\r\n"
            )
            assert connection.recv(64).startswith(b"HTTP/1.1 400 ")


class TestSamplers:
    """The rarer samplers through HTTP: the shapes model is certain of its answers, so what moves it is the sampler."""

    def test_unwanted_words_change_the_answer(self, client: openai.OpenAI, images: str) -> None:
        image = f"{images}/red-circle.png"
        answer = ask(client, image, temperature=0, extra_body={"bad_words": ["red"]})
        assert "red" not in answer.split()
        assert answer

    def test_blocked_ngrams_change_the_answer(self, server: LiveServer) -> None:
        body = {
            "prompt": "a red circle a red circle a red", "temperature": 0, "max_tokens": 8, "ignore_eos": True,
            "return_token_ids": True,
        }  # fmt: skip
        free, blocked = (
            server.http.post("/v1/completions", json={**body, **extra}).json()["choices"][0]
            for extra in ({}, {"no_repeat_ngram_size": 2})
        )
        text = [*blocked["prompt_token_ids"], *blocked["token_ids"]]
        pairs = list(pairwise(text))
        own = pairs[len(blocked["prompt_token_ids"]) - 1 :]
        assert all(pairs.count(pair) == 1 for pair in own)
        assert free["token_ids"] != blocked["token_ids"]

    def test_only_allowed_tokens_are_chosen(self, server: LiveServer) -> None:
        body = {"prompt": "a", "max_tokens": 6, "allowed_token_ids": [40, 41], "return_token_ids": True}
        choice = server.http.post("/v1/completions", json=body).json()["choices"][0]
        assert set(choice["token_ids"]) <= {40, 41}
        refused = server.http.post("/v1/completions", json={**body, "allowed_token_ids": [768]})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "allowed_token_ids"

    def test_all_of_them_at_once_answer_and_repeat_by_their_seed(self, client: openai.OpenAI) -> None:
        fields = {
            "top_a": 0.01, "tfs": 0.99, "eta_cutoff": 1.0, "epsilon_cutoff": 1.0, "typical_p": 0.99,
            "smoothing_factor": 0.01, "smoothing_curve": 1.2, "dynatemp_min": 5.0, "dynatemp_max": 30.0,
            "xtc_threshold": 0.2, "xtc_probability": 0.5, "nsigma": 5.0, "dry_multiplier": 0.8, "skew": 0.1,
            "mirostat_mode": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.1, "no_repeat_ngram_size": 4,
            "temperature_last": False, "dry_sequence_breakers": '["\\n"]', "dry_penalty_last_n": 64,
            "custom_token_bans": [9],
        }  # fmt: skip
        answers = [
            client.completions.create(
                model="m",
                prompt="a",
                seed=seed,
                max_tokens=12,
                temperature=1,
                extra_body={"ignore_eos": True, **fields},
            )
            .choices[0]
            .text
            for seed in (1, 1, 2, 3)
        ]
        assert answers[0] == answers[1]
        assert len(set(answers)) > 1

    @pytest.mark.parametrize(
        ("name", "value"),
        [("tfs", 0), ("mirostat_mode", 1), ("dynatemp_low", -1), ("sampler_priority", [1, 2]), ("nsigma", "x")],
    )
    def test_what_is_out_of_range_is_a_400_that_names_it(self, client: openai.OpenAI, name: str, value: Any) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "x"}], extra_body={name: value}
            )
        assert caught.value.param == name
