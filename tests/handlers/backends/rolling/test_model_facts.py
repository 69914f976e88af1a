"""The front learns of a model from the engine's process, and needs neither torch nor most of transformers."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, processors

from engine.errors import ModelLoadError
from handlers.backends.rolling.engine_client import EngineProcess
from handlers.backends.rolling.model_facts import TOKENIZER, ModelQuestion, ask_engine, model_facts
from handlers.prompts.tokenizer import load_tokenizer
from tests.support.model_front import HEAVY, LOAD, ROOT, learned
from tests.support.models import make_llava
from tests.support.shapes import SHAPES


def test_the_front_needs_no_torch_and_prepares_the_same() -> None:
    """The test's own process has torch, and asks the auto classes itself: the two ways must agree."""
    import torch  # noqa: F401
    from transformers import AutoTokenizer

    from engine.loader import load_preprocessor

    found = learned(SHAPES, asks=True)
    assert found["heavy"] == HEAVY
    tokenizer = AutoTokenizer.from_pretrained(SHAPES)
    assert found["ids"] == tokenizer("a red circle").input_ids
    assert found["eos"] == [tokenizer.eos_token_id]
    preprocessor = load_preprocessor(str(SHAPES))
    assert preprocessor is not None
    if preprocessor.to_bytes() is None:
        pytest.fail("the shapes model has the usual processor")
    image = preprocessor.prepare(Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 20).convert("RGB"))
    assert found["tokens"] == len(image.token_ids)
    assert found["pixels"] == float(image.tensors["pixel_values"].sum())
    assert found["fingerprint"] == preprocessor.fingerprint.hex()


@pytest.mark.parametrize("name", ["LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "TokenizersBackend"])
def test_a_tokenizer_of_any_class_encodes_the_same_in_the_light_class(name: str, tmp_path: Path) -> None:
    """Whether it is plain or not is the answer's to say; where it says so, all must be equal."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    model, folder = tmp_path / "model", tmp_path / "facts"
    make_llava(model)
    folder.mkdir()
    settings = model / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": name}))
    facts = model_facts(ModelQuestion(str(model), None, "auto", False), folder)
    own = AutoTokenizer.from_pretrained(model)
    if not facts.tokenizer_is_plain:
        return
    plain = PreTrainedTokenizerFast.from_pretrained(folder / TOKENIZER)
    for text in ("a red circle", "<image>\nWhat is this? ", "héé 你好 🦙\x00", "  two  spaces "):
        assert plain(text).input_ids == own(text).input_ids
        assert plain.decode(own(text).input_ids) == own.decode(own(text).input_ids)


def test_a_tokenizer_that_the_light_class_reads_otherwise_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    read = PreTrainedTokenizerFast.from_pretrained

    def altered(*given: object, **named: object) -> object:
        tokenizer = read(*given, **named)
        if given[0] != tmp_path / TOKENIZER:
            return tokenizer
        backend: Tokenizer = tokenizer.backend_tokenizer
        backend.post_processor = processors.Sequence([])
        backend.add_tokens(["one more"])
        return tokenizer

    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", altered)
    facts = model_facts(ModelQuestion(str(SHAPES), None, "auto", False), tmp_path)
    assert not facts.tokenizer_is_plain


def test_a_model_without_a_fast_tokenizer_is_an_error(tmp_path: Path) -> None:
    make_llava(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match="tokenizer"):
        load_tokenizer(str(tmp_path), trust_remote_code=False)


def test_a_model_that_cannot_be_read_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        model_facts(ModelQuestion(str(tmp_path / "model"), None, "auto", False), tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "model")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "ModelLoadError: config.json of the model cannot be read" in done.stderr


_START = """
import asyncio, json, sys
from pathlib import Path
from types import SimpleNamespace
from handlers.backends.rolling.engine import RollingEngine
from properties.settings import Settings
spawned = []
sys.addaudithook(lambda event, given: spawned.append(given[1][-2]) if event == "subprocess.Popen" else None)

async def main():
    settings = Settings(kv_cache_memory_mb=8)
    backend = await RollingEngine.start(SimpleNamespace(settings=settings), Path(sys.argv[1]))
    await backend.close()
    return backend.health().ready, backend.capabilities.images

print(json.dumps([*asyncio.run(main()), spawned, "torch" in sys.modules]))
"""


def test_a_start_imports_torch_in_one_process_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _START, str(SHAPES)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [False, True, ["engine.process"], bool(HEAVY)]


def test_an_engine_that_ends_or_is_late_when_asked_is_an_error(tmp_path: Path) -> None:
    question = ModelQuestion(str(SHAPES), None, "auto", False)

    async def asked(seconds: float | None, *, kill: bool) -> None:
        engine = await EngineProcess.spawn()
        try:
            if kill:
                engine.kill()
            await ask_engine(engine, question, tmp_path, seconds)
        finally:
            await engine.stop()

    with pytest.raises(ModelLoadError, match="could not be read; the log has more"):
        asyncio.run(asked(None, kill=True))
    with pytest.raises(ModelLoadError, match=r"not read within 0\.01 seconds"):
        asyncio.run(asked(0.01, kill=False))
