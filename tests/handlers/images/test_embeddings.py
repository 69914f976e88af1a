"""Embeddings that clients send in place of images: what is read of a file, and that no file does harm."""

from __future__ import annotations

import asyncio
import base64
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from handlers.backends.embeddings import EmbeddingsWanted
from handlers.errors import ImageError, InvalidRequest
from handlers.images.limits import ImageLimits
from handlers.images.loader import ImageLoader
from handlers.protocols.openai.messages import read_messages
from handlers.request import EmbeddingsPart, LoadedEmbeddings
from tests.support.embeddings import WANTED, Shell, loaded, messages
from tests.support.saved_tensors import bomb, encoded, part, repacked, saved, with_pickle

ROWS = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
QWEN = EmbeddingsWanted(hidden_size=16, most_tokens=64, dtype="float32", merge=2)


def refused(thing: Any, wanted: EmbeddingsWanted = WANTED, **limits: Any) -> str:
    """Why it is, by the way: without any large allocation."""
    sent = part(thing)
    tracemalloc.start()
    try:
        with pytest.raises(ImageError) as caught:
            loaded(sent, wanted=wanted, **limits)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert caught.value.status in (400, 413)
    return caught.value.message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_of_every_floating_type_are_read_exactly(dtype: torch.dtype) -> None:
    (found,) = loaded(part(ROWS.to(dtype)))
    assert found.rows.dtype == np.float32
    assert torch.equal(torch.from_numpy(found.rows), ROWS.to(dtype).float())
    assert found.largest == ROWS.to(dtype).float().abs().max().item()


@pytest.mark.parametrize(
    "thing",
    [
        ROWS[None],
        torch.nn.Parameter(ROWS),
        ROWS.clone().requires_grad_(),
        torch.cat([torch.zeros(3, 16), ROWS, torch.zeros(2, 16)])[3:10],
        torch.cat([ROWS, ROWS]).reshape(2, 7, 16)[1],
    ],
    ids=["a batch of one", "a parameter", "with a gradient", "a slice", "one of a batch"],
)
def test_tensors_as_programs_have_them_at_hand_are_read(thing: torch.Tensor) -> None:
    (found,) = loaded(part(thing))
    assert torch.equal(torch.from_numpy(found.rows), ROWS)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_pickle_is_read(protocol: int) -> None:
    (found,) = loaded(part(saved(ROWS, pickle_protocol=protocol)))
    assert torch.equal(torch.from_numpy(found.rows), ROWS)


def test_several_keep_their_order_and_the_same_files_have_the_same_digest() -> None:
    found = loaded(part(ROWS), part(ROWS + 1), part(ROWS))
    assert [one.rows[0, 0] for one in found] == [ROWS[0, 0], ROWS[0, 0] + 1, ROWS[0, 0]]
    assert found[0].digest == found[2].digest != found[1].digest


def test_a_grid_is_read_as_a_tensor_and_as_numbers() -> None:
    rows = torch.ones(6, 16)
    given = [
        part({"image_embeds": rows, "image_grid_thw": torch.tensor([[1, 4, 6]])}),
        part({"image_embeds": rows, "image_grid_thw": torch.tensor([1, 4, 6], dtype=torch.int32)}),
    ]
    for numbers in ([1, 4, 6], [[1, 4, 6]], [1, 6, 4]):
        given.append(
            {
                "type": "image_embeds",
                "image_embeds": {"image_embeds": encoded(rows), "image_grid_thw": numbers},
            }
        )
    found = loaded(*given, wanted=QWEN)
    assert [one.grid for one in found] == [(1, 4, 6)] * 4 + [(1, 6, 4)]
    assert len({one.digest for one in found[2:]}) == 2


def billion_laughs() -> bytes:
    """Nested pairs of the same pair: a repr or a comparison of it would never end."""
    doubled = b"\x86q\x01" + b"h\x01h\x01\x86q\x01" * 200
    return b"\x80\x02K\x01K\x01" + doubled


STRANGE: dict[str, tuple[Callable[[], Any], str]] = {
    "one dimension": (lambda: torch.ones(16), "has the shape [16]; wanted: [tokens, hidden size]"),
    "no dimension": (lambda: torch.tensor(1.0), "has the shape []; wanted"),
    "four dimensions": (lambda: torch.ones(1, 1, 7, 16), "has the shape [1, 1, 7, 16]"),
    "a batch": (lambda: torch.ones(2, 7, 16), "has the shape [2, 7, 16]; wanted: [tokens, hidden size], one"),
    "another hidden size": (lambda: torch.ones(7, 17), "has the shape [7, 17]; this model wants [tokens, 16]"),
    "too many tokens": (lambda: torch.ones(65, 16), "has the shape [65, 16]; this server takes at most 64"),
    "nothing": (lambda: torch.ones(0, 16), "its tensor is empty: [0, 16]"),
    "not a number": (lambda: torch.full((7, 16), torch.nan), "numbers that are not finite"),
    "one that is not a number": (lambda: torch.cat([ROWS, torch.full((1, 16), torch.nan)]), "not finite"),
    "infinite": (lambda: torch.full((7, 16), -torch.inf), "numbers that are not finite"),
    "beyond float32": (lambda: torch.full((7, 16), 1e300, dtype=torch.float64), "not finite in float32"),
    "integers": (lambda: torch.ones(7, 16, dtype=torch.int64), "its numbers are 'int64'; allowed: float16"),
    "bytes": (lambda: torch.ones(7, 16, dtype=torch.uint8), "'ByteStorage'"),
    "booleans": (lambda: torch.ones(7, 16, dtype=torch.bool), "'BoolStorage'"),
    "complex": (lambda: torch.ones(7, 16, dtype=torch.complex64), "'ComplexFloatStorage'"),
    "eight bits": (lambda: torch.ones(7, 16).to(torch.float8_e4m3fn), "not a dense tensor"),
    "sparse": (lambda: torch.ones(7, 16).to_sparse(), "not a dense tensor"),
    "without data": (lambda: torch.ones(7, 16, device="meta"), "_rebuild_meta_tensor_no_storage"),
    "expanded": (lambda: torch.ones(1).expand(7, 16), "strides [0, 0]"),
    "expanded to a terabyte": (lambda: torch.ones(1, 16).expand(2**34, 16), "strides [0, 1]"),
    "transposed": (lambda: torch.ones(16, 7).T, "save tensor.contiguous()"),
    "a dictionary": (lambda: saved({"a": ROWS}), "more than a tensor"),
    "a list": (lambda: [ROWS], "more than a tensor"),
    "a number": (lambda: 5, "no tensor"),
    "an object with code": (Shell, "not a dense tensor"),
    "code in a pickle alone": (lambda: pickle.dumps(Shell()), "not a file of torch.save"),
    "the old format": (lambda: saved(ROWS, _use_new_zipfile_serialization=False), "not a file of torch.save"),
    "a bomb": (lambda: bomb(1), "it is compressed"),
    "cut short": (lambda: saved(ROWS)[:-50], "cut short"),
    "cut to its beginning": (lambda: saved(ROWS)[:4], "cut short"),
    "no bytes": (lambda: b"", "cut short"),
    "text": (lambda: b"hello", "not a file of torch.save"),
    "doubled pairs": (lambda: with_pickle(saved(ROWS), billion_laughs() + b"."), "no tensor"),
    "doubled pairs by a name": (
        lambda: with_pickle(saved(ROWS), billion_laughs() + b"h\x01h\x01\x93h\x01R."),
        "more than a tensor",
    ),
    "doubled pairs as a storage": (
        lambda: with_pickle(
            saved(ROWS), billion_laughs() + b"X\x07\0\0\0storageh\x01h\x01\x93h\x01h\x01K\x01tQ."
        ),
        "damaged",
    ),
    "a long pickle": (lambda: with_pickle(saved(ROWS), b"\x80\x02" + b"K\x01" * 4000), "more than a tensor"),
    "a huge memo": (
        lambda: with_pickle(saved(ROWS), b"\x80\x02K\x01r\xff\xff\xff\x7f."),
        "no tensor",
    ),
    "a pickle without an end": (lambda: with_pickle(saved(ROWS), b"\x80\x02K\x01"), "damaged"),
    "missing values": (
        lambda: repacked(saved(ROWS), lambda name, old: None if name.endswith("/data/0") else old),
        "missing or cut short",
    ),
    "fewer values": (
        lambda: repacked(saved(ROWS), lambda name, old: old[:-4] if name.endswith("/data/0") else old),
        "missing or cut short",
    ),
    "values of the other order": (
        lambda: repacked(saved(ROWS), lambda name, old: b"big" if name.endswith("order") else old),
        "big-endian",
    ),
    "many entries": (
        lambda: _with_directory(count=65535),
        "its directory is not one",
    ),
}  # fmt: skip


def _with_directory(count: int) -> bytes:
    file = saved(ROWS)
    return file[:-14] + struct.pack("<HH", count, count) + file[-10:]


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_plain_tensor_of_the_right_shape_is_refused_with_what_is_wrong(name: str) -> None:
    made, reason = STRANGE[name]
    message = refused(made())
    assert message.startswith("image 0: ")
    assert reason in message
    assert len(message) < 300


def test_an_offset_beyond_the_values_is_refused() -> None:
    file = saved(torch.ones(14, 16)[7:])
    pickled = next(content for name, content in _contents(file).items() if name.endswith("/data.pkl"))
    moved = pickled.replace(b"Kp", b"Kq")
    assert moved != pickled
    assert "reaches beyond" in refused(with_pickle(file, moved))


def _contents(file: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    repacked(file, lambda name, content: found.setdefault(name, content))
    return found


def test_a_file_with_a_flipped_bit_is_refused_or_reads_as_a_tensor_of_the_right_shape() -> None:
    """Every single bit of the archive's own, and some of any place: never another error, never a crash."""
    file = saved(ROWS)
    chosen = random.Random(5)
    accepted = 0
    for _ in range(3000):
        damaged = bytearray(file)
        for _ in range(chosen.choice((1, 1, 2, 8))):
            damaged[chosen.randrange(len(file))] ^= 1 << chosen.randrange(8)
        try:
            (found,) = _decoded(bytes(damaged))
        except ImageError:
            continue
        assert found.rows.shape == (7, 16)
        accepted += 1
    assert 0 < accepted < 2500


def _decoded(file: bytes) -> list[LoadedEmbeddings]:
    from handlers.images import ImageProblem
    from handlers.images.embeddings import read_embeddings

    try:
        part = EmbeddingsPart(base64.b64encode(file).decode())
        part.loaded = read_embeddings(part, 2**20).decode()
    except ImageProblem as problem:
        raise ImageError(0, problem.reason) from problem
    return WANTED.checked([part])


def test_a_damaged_value_is_noticed() -> None:
    file = bytearray(saved(ROWS))
    at = file.find(ROWS.numpy().tobytes())
    file[at + 5] ^= 1
    assert "a checksum is wrong" in refused(bytes(file))


@pytest.mark.parametrize("text", ["", "%%%", "AAA", "YQ==\n", "data:;base64,AAAA", "é"])
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(ImageError) as caught:
        loaded({"type": "image_embeds", "image_embeds": text})
    assert "base64" in caught.value.message or "cut short" in caught.value.message


def test_files_above_the_limit_on_images_are_refused_before_they_are_decoded() -> None:
    message = refused(torch.ones(7, 16), max_bytes=600)
    assert message == "image 0: it has more than 600 bytes (option.max_image_bytes)"
    size = len(saved(torch.ones(7, 16)))
    assert loaded(part(torch.ones(7, 16)), max_bytes=size)
    assert "more than" in refused(torch.ones(7, 16), max_bytes=size - 1)


def test_numbers_beyond_the_models_type_are_refused() -> None:
    for dtype, value in (("float16", 70000.0), ("bfloat16", 3.4e38)):
        wanted = EmbeddingsWanted(hidden_size=16, most_tokens=64, dtype=dtype)
        message = refused(torch.full((7, 16), -value), wanted)
        assert f"holds {value:g}; the model's {dtype} holds at most" in message
        assert torch.isfinite(torch.full((1,), value)).all()
        assert loaded(part(torch.full((7, 16), 65504.0)), wanted=wanted)


@pytest.mark.parametrize(
    ("grid", "reason"),
    [
        (None, "this model wants image_grid_thw"),
        (torch.tensor([1, 4, 8]), "which is 8 tokens; image_embeds has 6 rows"),
        (torch.tensor([1, 3, 8]), "must be multiples of 2"),
        (torch.tensor([0, 4, 6]), "numbers from 1"),
        (torch.tensor([-1, -4, 6]), "numbers from 1"),
        (torch.tensor([1, 2**62, 2**62]), "tokens; image_embeds has 6 rows"),
        (torch.tensor([2, 2, 6]), "an image has 1 frame"),
        (torch.tensor([1.0, 4.0, 6.0]), "its numbers are 'float32'; allowed: int32, int64"),
        (torch.tensor([1, 4]), "has the shape [2]"),
        (torch.tensor([[1, 4, 6], [1, 4, 6]]), "has the shape [2, 3]"),
    ],
)
def test_a_grid_must_fit_the_rows(grid: torch.Tensor | None, reason: str) -> None:
    rows = torch.ones(6, 16)
    thing = rows if grid is None else {"image_embeds": rows, "image_grid_thw": grid}
    assert reason in refused(thing, QWEN)


def test_a_grid_for_a_model_that_wants_none_is_refused() -> None:
    assert "wants no image_grid_thw" in refused({"image_embeds": ROWS, "image_grid_thw": torch.ones(3).long()})


@pytest.mark.parametrize(
    ("given", "param", "reason"),
    [
        (None, "messages[0].content[0].image_embeds", "is missing"),
        (5, "messages[0].content[0].image_embeds", "not a string"),
        ({}, "messages[0].content[0].image_embeds.image_embeds", "is missing"),
        ({"image_embeds": "AA", "zz": "AA"}, "messages[0].content[0].image_embeds", "'zz'"),
        (
            {"image_embeds": "AA", "image_grid_thw": [1, 2]},
            "messages[0].content[0].image_embeds.image_grid_thw",
            "3 whole numbers",
        ),
        (
            {"image_embeds": "AA", "image_grid_thw": [1, 2, True]},
            "messages[0].content[0].image_embeds.image_grid_thw",
            "3 whole numbers",
        ),
    ],
)
def test_a_part_of_the_wrong_form_is_named_with_its_path(given: Any, param: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_messages(messages({"type": "image_embeds", "image_embeds": given}), embeddings=True)
    assert caught.value.param == param
    assert reason in caught.value.message


def test_without_the_option_they_are_refused_with_its_name() -> None:
    with pytest.raises(InvalidRequest, match=r"option\.enable_mm_embeds=true") as caught:
        read_messages(messages(part(ROWS)))
    assert caught.value.param == "image_embeds"


def test_images_and_embeddings_do_not_mix_even_over_several_turns() -> None:
    image = {"type": "image_url", "image_url": {"url": "https://p.example/1.png"}}
    with pytest.raises(InvalidRequest, match="not both"):
        read_messages(messages(part(ROWS)) + messages(image), embeddings=True)


def test_memory_is_shared_with_decoded_images() -> None:
    """Two that do not fit together take turns, also where they are the same."""

    async def load() -> None:
        loader = ImageLoader(ImageLimits(memory_bytes=ROWS.nbytes * 3 // 2))
        first, second = (EmbeddingsPart(encoded(ROWS)) for _ in range(2))
        await loader.load([first])
        waiting = asyncio.create_task(loader.load([second]))
        done, _ = await asyncio.wait({waiting}, timeout=0.3)
        assert not done
        assert second.loaded is None
        first.release()
        await asyncio.wait_for(waiting, 10)
        assert second.loaded is not None
        await loader.aclose()

    asyncio.run(load())


def test_reading_needs_no_torch() -> None:
    """The front of the embedded engine lives without it."""
    code = (
        "import sys; from handlers.images.embeddings import read_embeddings; "
        "from handlers.request import EmbeddingsPart; "
        "read_embeddings(EmbeddingsPart(sys.stdin.read()), 2**20).decode(); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=encoded(ROWS), text=True, timeout=60)
    assert done.returncode == 0
