"""What is unpacked as a model, and what is refused."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from container.models.prepare import unpack
from handlers.errors import InsufficientStorage, InvalidRequest

Member = tuple[tarfile.TarInfo, bytes]


def plain(name: str, content: bytes = b"x") -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info, content


def other(name: str, kind: bytes, linkname: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info, b""


def packed(path: Path, *members: Member) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "outer" / "place").mkdir(parents=True)
    return tmp_path / "outer" / "place"


def test_files_and_directories_are_unpacked(tmp_path: Path, place: Path) -> None:
    source = packed(
        tmp_path / "m.tar.gz",
        other(".", tarfile.DIRTYPE),
        other("./deep", tarfile.DIRTYPE),
        plain("./config.json", b"{}"),
        plain("deep/er/weights", b"w" * 100_000),
    )
    unpack(source, place)
    assert (place / "config.json").read_bytes() == b"{}"
    assert (place / "deep/er/weights").read_bytes() == b"w" * 100_000


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([plain("../out")], "leads out"),
        ([plain("a/../../out")], "leads out"),
        ([plain("/out")], "leads out"),
        ([plain("a\\..\\out")], "leads out"),
        ([other("link", tarfile.SYMTYPE, "/etc/passwd")], "neither"),
        ([other("link", tarfile.SYMTYPE, "."), plain("link/out")], "neither"),
        ([plain("file"), other("link", tarfile.LNKTYPE, "file")], "neither"),
        ([other("link", tarfile.LNKTYPE, "../../etc/passwd")], "neither"),
        ([other("null", tarfile.CHRTYPE)], "neither"),
        ([other("disk", tarfile.BLKTYPE)], "neither"),
        ([other("pipe", tarfile.FIFOTYPE)], "neither"),
        ([other("sparse", tarfile.GNUTYPE_SPARSE)], "archive is refused"),
        ([plain("twice"), plain("twice")], "twice"),
        ([plain("file"), plain("file/below")], "twice"),
        ([other("d", tarfile.DIRTYPE), plain("d")], "twice"),
        ([plain("/".join("d" * 20))], "too long"),
        ([plain("x" * 300)], "cannot be unpacked"),
        ([plain("x/" + "y" * 1200)], "too long"),
    ],
)  # fmt: skip
def test_what_is_no_plain_file_below_it_is_refused(
    tmp_path: Path, place: Path, members: list[Member], why: str
) -> None:
    with pytest.raises(InvalidRequest, match=why):
        unpack(packed(tmp_path / "m.tar.gz", *members), place)
    assert os.listdir(place.parent) == ["place"]
    assert not [path for path in place.rglob("*") if path.is_symlink()]
    assert not Path("/out").exists()


def zeros(path: Path, count: int, size: int) -> Path:
    """An archive of `count` files of `size` zero bytes, which gzip makes a thousandth of."""
    with tarfile.open(path, "w:gz") as tar:
        for number in range(count):
            info = tarfile.TarInfo(str(number))
            info.size = size
            with open("/dev/zero", "rb") as source:
                tar.addfile(info, source)
    return path


def test_what_unpacks_to_far_more_than_its_size_is_refused_before_it_is_written(tmp_path: Path, place: Path) -> None:
    for number, source in enumerate((zeros(tmp_path / "one", 1, 2**27), zeros(tmp_path / "many", 16, 2**23))):
        (below := place / str(number)).mkdir()
        with pytest.raises(InvalidRequest, match="size does not explain"):
            unpack(source, below)
        assert sum(path.stat().st_size for path in below.iterdir()) < 2**27


def test_a_size_that_is_only_claimed_is_refused(tmp_path: Path, place: Path) -> None:
    info = tarfile.TarInfo("big")
    info.size = 2**40
    path = tmp_path / "m.tar.gz"
    path.write_bytes(gzip.compress(info.tobuf() + b"\0" * 2048))
    with pytest.raises(InvalidRequest, match="size does not explain"):
        unpack(path, place)
    info.size = 2**20
    path.write_bytes(gzip.compress(info.tobuf() + b"\0" * 2048))
    with pytest.raises(InvalidRequest, match="cut off"):
        unpack(path, place)


def test_too_many_entries_are_refused(tmp_path: Path, place: Path) -> None:
    members = [other(str(number), tarfile.DIRTYPE) for number in range(10_001)]
    with pytest.raises(InvalidRequest, match="more than 10000 entries"):
        unpack(packed(tmp_path / "m.tar.gz", *members), place)


def _cut(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def _flipped(whole: bytes) -> bytes:
    at = len(whole) // 2  # in what does not compress, so that only the sum at the end can tell
    return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]


def _changed(whole: bytes) -> bytes:
    return whole[:40] + bytes(byte ^ 255 for byte in whole[40:60]) + whole[60:]


@pytest.mark.parametrize(
    "damage",
    [_cut, _changed, _flipped, gzip.decompress, lambda _: b"", lambda _: os.urandom(4096), lambda _: b"PK\3\4zip"],
)
def test_what_is_no_whole_archive_is_refused(tmp_path: Path, place: Path, damage: Callable[[bytes], bytes]) -> None:
    path = packed(tmp_path / "m.tar.gz", plain("weights", os.urandom(200_000)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InvalidRequest, match="the archive is refused"):
        unpack(path, place)


def test_a_disk_without_space_is_said_to_be_full(tmp_path: Path, place: Path) -> None:
    with pytest.raises(InsufficientStorage, match=r"0\.00 GiB of the disk are left"):
        unpack(packed(tmp_path / "m.tar.gz", plain("weights")), place, spare_bytes=2**60)
