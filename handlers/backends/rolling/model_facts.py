"""What transformers knows about a model, found out by the engine's process before it loads the model.

Its auto classes import torch and much of transformers: 340 MB and several seconds. A front end, which never runs a
model, needs nothing of this, while an engine needs it anyway. So the engine's process is asked (`ask_engine`), and the
front end gets the tokenizer as files that the light classes read, and a few facts. If the light classes would not give
the same result (`tokenizer_is_plain`, `preprocessor`), the answer says so.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import EngineDead, ModelLoadError, one_line
from engine.families.pixels import ProcessorBackend
from handlers.backends.rolling.engine_client import EngineProcess
from handlers.prompts.tokenizer import load_tokenizer

TOKENIZER = "tokenizer"
_AUTO_CLASSES = "transformers.models.auto.modeling_auto"
_PROBES = (" Hello,  world!\n", "<s>héé 你好 🦙</s>", "")


class ModelQuestion(msgspec.Struct):
    """What to find out, and about which model.

    Attributes:
        model_path: The model's directory.
        processor_overrides: Changes to the settings of the image processor.
        processor_backend: Which implementation prepares images.
        trust_remote_code: Whether the model's own Python code may run.
        tensor_parallel_degree: 1 if the number of devices decides.
    """

    model_path: str
    processor_overrides: dict[str, Any] | None
    processor_backend: ProcessorBackend
    trust_remote_code: bool
    tensor_parallel_degree: int = 1


class ModelFacts(msgspec.Struct):
    """What the front end must know of a model.

    Attributes:
        kind: The name of the family.
        vocab_size: Tokens in the vocabulary.
        eos_token_id: From the model's config, which may name several or none.
        accelerators: Devices that torch sees.
        positions: The most tokens of prompt and answer that the model was made for.
        tokenizer_is_plain: Whether the plain fast class gives the very same tokenizer from the files under `tokenizer`.
        takes_images: Whether the model accepts images.
        preprocessor: The family's preprocessor, serialized; None for a model without images, and for one whose images
            only transformers can prepare.
    """

    kind: str
    vocab_size: int
    eos_token_id: list[int] | int | None
    accelerators: int
    positions: int | None
    tokenizer_is_plain: bool
    takes_images: bool
    preprocessor: bytes | None


class _Failed(msgspec.Struct, tag=True):
    message: str


class _Found(msgspec.Struct, tag=True):
    facts: ModelFacts


Asking = Callable[[ModelQuestion, Path, float | None], ModelFacts]
"""A blocking function with the arguments of `model_facts` that asks another process."""


def ask_new_process(question: ModelQuestion, folder: Path, seconds: float | None) -> ModelFacts:
    """Ask a process that is started just for this."""

    async def ask() -> ModelFacts:
        engine = await EngineProcess.spawn()
        try:
            return await ask_engine(engine, question, folder, seconds)
        finally:
            await engine.stop()

    return asyncio.run(ask())


def model_facts(
    question: ModelQuestion, folder: Path, seconds: float | None = None, ask: Asking = ask_new_process
) -> ModelFacts:
    """Find out about a model: here, if the auto classes are imported already for other reasons; else ask. Blocking.

    Args:
        question: What to find out.
        folder: An empty directory; afterwards its `tokenizer` contains the tokenizer's files.
        seconds: The time limit of asking; None for none.
        ask: Asks another process.

    Raises:
        ModelLoadError: The model cannot be served, or it takes too long.
    """
    return _found(question, folder) if _AUTO_CLASSES in sys.modules else ask(question, folder, seconds)


async def ask_engine(engine: EngineProcess, question: ModelQuestion, folder: Path, seconds: float | None) -> ModelFacts:
    """Ask an engine's process that has been spawned but has not loaded a model; see `model_facts`."""
    asked = msgspec.msgpack.encode((question, str(folder)))
    try:
        async with asyncio.timeout(seconds):
            reply = await engine.ask(f"{__name__}:{answer.__name__}", asked)
    except TimeoutError as error:
        raise ModelLoadError(f"the model's files were not read within {seconds:g} seconds") from error
    except EngineDead as error:
        raise ModelLoadError("the model's files could not be read; the log has more") from error
    found = msgspec.msgpack.decode(reply, type=_Found | _Failed)
    if isinstance(found, _Failed):
        raise ModelLoadError(found.message)
    return found.facts


def answer(asked: bytes) -> bytes:
    """Answer a question; called in the engine's process."""
    question, folder = msgspec.msgpack.decode(asked, type=tuple[ModelQuestion, str])
    found: _Found | _Failed
    try:
        found = _Found(_found(question, Path(folder)))
    except ModelLoadError as error:
        found = _Failed(str(error))
    return msgspec.msgpack.encode(found)


def _found(question: ModelQuestion, folder: Path) -> ModelFacts:
    """Find out about the model. Raises only ModelLoadError."""
    try:
        return _look(question, folder)
    except ModelLoadError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ModelLoadError(f"the model's files cannot be read: {one_line(error)}") from error


def _look(question: ModelQuestion, folder: Path) -> ModelFacts:
    import torch

    from engine.families.registry import kind_of
    from engine.loader import check_ranks, load_preprocessor, quiet_transformers, read_config

    quiet_transformers()
    path = question.model_path
    config = read_config(path)
    text_config = config.get_text_config()
    if question.tensor_parallel_degree > 1:
        check_ranks(path, question.tensor_parallel_degree)
    tokenizer = load_tokenizer(path, trust_remote_code=question.trust_remote_code)
    try:
        preprocessor = load_preprocessor(path, question.processor_overrides, question.processor_backend)
    except ModelLoadError:
        raise
    except Exception as error:  # as above
        raise ModelLoadError(f"the model's image processor cannot be loaded: {one_line(error)}") from error
    return ModelFacts(
        kind=kind_of(config),
        vocab_size=int(text_config.vocab_size),
        eos_token_id=getattr(text_config, "eos_token_id", None),
        accelerators=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        positions=getattr(text_config, "max_position_embeddings", None),
        tokenizer_is_plain=_save_plain(tokenizer, folder / TOKENIZER),
        takes_images=preprocessor is not None,
        preprocessor=None if preprocessor is None else preprocessor.to_bytes(),
    )


def _save_plain(tokenizer: Any, folder: Path) -> bool:
    """Write the tokenizer's files, and return whether the plain class makes the same tokenizer of them."""
    from transformers import PreTrainedTokenizerFast

    own: Any = type(tokenizer)
    if any(
        getattr(own, name) is not getattr(PreTrainedTokenizerFast, name)
        for name in ("apply_chat_template", "decode", "convert_ids_to_tokens")
    ):
        return False
    tokenizer.save_pretrained(folder)
    plain: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    same = (
        plain.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        and plain.chat_template == tokenizer.chat_template
        and set(plain.all_special_tokens) == set(tokenizer.all_special_tokens)
        and plain.special_tokens_map == tokenizer.special_tokens_map
        and (plain.bos_token_id, plain.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    return same and all(plain(probe).input_ids == tokenizer(probe).input_ids for probe in _PROBES)
