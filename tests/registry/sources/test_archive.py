"""Archives that nobody vouches for."""

from __future__ import annotations

import bz2
import gzip
import io
import stat
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from load_tests.drills.archives import tarred, zipped
from load_tests.drills.bombs import BOMBS
from server.errors import ChorusError, InvalidRequest, TooLarge, UnsupportedMedia
from server.peft.format import PICKLES
from server.registry.sources import archive_reader
from server.registry.sources.archive import refusal, unpack
from server.registry.store import Staging
from tests.lora.adapter_folder import LIMITS
from tests.registry import adapter_files

MIB = 2**20
FILES = adapter_files.files()


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Staging]:
    staging = Staging(tmp_path)
    yield staging
    staging.discard()
    assert list(tmp_path.iterdir()) == []


def unpacked(staging: Staging, archive: bytes, most: int = MIB) -> dict[str, bytes]:
    """What comes out, read here: most tests need no process for it."""
    with ExitStack() as opened:
        targets = {name: opened.enter_context(target(staging, name)).fileno() for name in FILES}
        files = {name: (fd, MIB if name.endswith(".json") else most) for name, fd in targets.items()}
        try:
            archive_reader.unpack(io.BytesIO(archive), archive_reader.Order(files, most, PICKLES))
        except archive_reader.Refused as refused:
            raise refusal(refused.answer) from refused
    return content(staging)


def unpacked_beside(staging: Staging, archive: bytes, most: int = MIB) -> dict[str, bytes]:
    """What comes out, read in a process of its own."""
    (staging.content.parent / "upload").write_bytes(archive)
    with (staging.content.parent / "upload").open("rb") as file:
        unpack(file, staging, replace(LIMITS, max_unpacked_bytes=most))
    return content(staging)


def target(staging: Staging, name: str) -> BinaryIO:
    (staging.content / name).unlink(missing_ok=True)  # of an archive before
    return staging.unhashed(name)


def content(staging: Staging) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in staging.content.iterdir()}


def under(folder: str) -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in FILES.items()}


def tar_of(*entries: tarfile.TarInfo, content: dict[str, bytes] = FILES) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for entry in entries:
            archive.addfile(entry, io.BytesIO(b"x" * entry.size))
    return buffer.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = link
    return info


@pytest.mark.parametrize(
    "archive",
    [
        zipped(FILES),
        zipped(FILES, zipfile.ZIP_STORED),
        zipped(
            under("my-adapter") | {"my-adapter/README.md": b"hello", "my-adapter/training_args.bin": b"x"}
        ),
        zipped(FILES | {"__MACOSX/._adapter_config.json": b"x", "deep/er/notes.txt": b"x"}),
        tarred(FILES, "w"),
        tarred(FILES),
        tarred(under(".") | {"./README.md": b"hello"}),
        tarred(under("./my-adapter")),
        tar_of(entry("folder", tarfile.DIRTYPE)),
    ],
)
def test_the_two_files_come_out(staging: Staging, archive: bytes) -> None:
    assert unpacked(staging, archive) == FILES


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "C:/x", "..\\x", "a\\..\\x", ".."])
def test_names_that_point_outside(staging: Staging, name: str) -> None:
    for archive in (zipped(FILES | {name: b"x"}), tarred(FILES | {name: b"x"})):
        with pytest.raises(InvalidRequest, match="points out of it"):
            unpacked(staging, archive)


@pytest.mark.parametrize(
    "bad",
    [
        entry("link", tarfile.SYMTYPE, "/etc/passwd"),
        entry("adapter_config.json", tarfile.SYMTYPE, "/etc/passwd"),
        entry("link", tarfile.LNKTYPE, "adapter_config.json"),
        entry("device", tarfile.CHRTYPE),
        entry("device", tarfile.BLKTYPE),
        entry("pipe", tarfile.FIFOTYPE),
        entry("sparse", tarfile.GNUTYPE_SPARSE),
    ],
)
def test_tar_entries_that_are_no_files(staging: Staging, bad: tarfile.TarInfo) -> None:
    with pytest.raises(InvalidRequest):
        unpacked(staging, tar_of(bad))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_zip_entries_that_are_no_files(staging: Staging, kind: int) -> None:
    buffer = io.BytesIO(zipped(FILES))
    info = zipfile.ZipInfo("link")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(InvalidRequest, match="no plain file"):
        unpacked(staging, buffer.getvalue())


ZEROS = FILES | {"adapter_model.safetensors": bytes(64 * MIB)}


@pytest.mark.parametrize("archive", [zipped(ZEROS), tarred(ZEROS)])
def test_bombs_stop_at_the_cap(staging: Staging, archive: bytes) -> None:
    assert len(archive) < MIB
    tracemalloc.start()
    with pytest.raises(TooLarge):
        unpacked(staging, archive)
    assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    tracemalloc.stop()
    assert sum(file.stat().st_size for file in staging.content.iterdir()) <= 2 * MIB


def test_what_is_passed_over_counts_too(staging: Staging) -> None:
    for archive in (
        tarred({"README.md": bytes(64 * MIB)} | FILES),
        tarred(FILES, "w:gz") + gzip.compress(bytes(64 * MIB)),
    ):
        with pytest.raises(TooLarge):
            unpacked(staging, archive)


def test_a_zip_that_lies_about_its_sizes(staging: Staging) -> None:
    archive = bytearray(zipped(ZEROS))
    sizes = struct.pack("<I", 64 * MIB)
    at = archive.rindex(sizes)  # of the uncompressed size in the directory
    archive[at : at + 4] = struct.pack("<I", 1000)
    with pytest.raises(ChorusError):
        unpacked(staging, bytes(archive))
    assert sum(file.stat().st_size for file in staging.content.iterdir()) <= 2 * MIB


def test_a_zip_directory_of_unreasonable_size(staging: Staging) -> None:
    many = zipped({f"{i:050}": b"" for i in range(12_000)})
    tracemalloc.start()
    with pytest.raises(InvalidRequest, match="directory"):
        unpacked(staging, many)
    assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    tracemalloc.stop()


def test_too_many_entries(staging: Staging) -> None:
    many = {str(i): b"" for i in range(1001)}
    for archive in (zipped(many), tarred(many)):
        with pytest.raises(InvalidRequest, match="entries"):
            unpacked(staging, archive)


def test_tar_headers_of_unreasonable_size(staging: Staging) -> None:
    long = entry("x")
    long.pax_headers = {"comment": "x" * (2 * MIB)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(long)
    with pytest.raises(InvalidRequest):
        unpacked(staging, buffer.getvalue(), 16 * MIB)


def test_a_chain_of_long_names(staging: Staging) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type = tarfile.GNUTYPE_LONGNAME
    header.size = 4
    link = header.tobuf(tarfile.GNU_FORMAT) + b"name".ljust(512, b"\0")
    with pytest.raises(InvalidRequest):
        unpacked(staging, link * 5000, 16 * MIB)


PICKLED = ["adapter_model.bin", "x/adapter_model.pt", "pytorch_model.bin", "m.pth", "m.ckpt", "m.pkl", "M.PT"]


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("name", PICKLED)
def test_pickles_are_named(staging: Staging, name: str, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    with pytest.raises(UnsupportedMedia, match="safetensors"):
        unpacked(staging, pack({"adapter_config.json": FILES["adapter_config.json"], name: b"x"}))


def encrypted() -> bytes:
    """The flag is all that says so; where it is set nothing is read further."""
    archive = bytearray(zipped(FILES))
    at = -1
    while (at := archive.find(b"PK\1\2", at + 1)) >= 0:
        archive[at + 8] |= 1
    return bytes(archive)


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (encrypted(), "encrypted"),
        (zipped({"adapter.zip": zipped(FILES)}), "another archive"),
        (tarred(FILES | {"more.tar.gz": b""}), "another archive"),
        (zipped(FILES, zipfile.ZIP_LZMA), "deflate"),
        (zipped(under("a") | {"b/adapter_config.json": b"{}"}), "more than one folder"),
        (zipped(under("a/b")), "deeper"),
        (tar_of(entry("adapter_config.json")), "twice"),
        (zipped({"adapter_config.json": b"{}"}), "adapter_model.safetensors"),
        (zipped({}), "adapter_config.json"),
        (zipped(FILES)[:-30], "damaged"),
        (zipped(FILES)[:200], "damaged"),
        (tarred(FILES)[:-200], "damaged"),
        (tarred(FILES)[:-8] + bytes(8), "damaged"),
        (tarred(FILES, "w")[:3000], "damaged"),
        (gzip.compress(b"not a tar" * 100, mtime=0), "damaged"),
        (bz2.compress(tarred(FILES, "w")), "neither"),
        (b"", "neither"),
        (b"PK\3\4", "damaged"),
        (b"PK\5\6" + bytes(18) + b"x", "damaged|adapter_config.json"),
    ],
)
def test_other_refusals(staging: Staging, archive: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        unpacked(staging, archive)


def test_a_damaged_member(staging: Staging) -> None:
    archive = bytearray(zipped(FILES, zipfile.ZIP_STORED))
    archive[len(archive) // 2] ^= 1
    with pytest.raises(InvalidRequest, match="damaged"):
        unpacked(staging, bytes(archive))


def test_a_huge_config(staging: Staging) -> None:
    with pytest.raises(TooLarge):
        unpacked(staging, zipped(FILES | {"adapter_config.json": bytes(3 * MIB)}), 16 * MIB)


def test_the_two_files_come_out_of_the_process(staging: Staging) -> None:
    for archive in (zipped(FILES), tarred(FILES)):
        for name in FILES:
            (staging.content / name).unlink(missing_ok=True)
        assert unpacked_beside(staging, archive) == FILES


def test_refusals_come_out_of_the_process(staging: Staging) -> None:
    with pytest.raises(UnsupportedMedia, match="safetensors"):
        unpacked_beside(staging, zipped({"adapter_model.bin": b""}))


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_whatever_they_cost(staging: Staging, name: str) -> None:
    """Without the limits of the process: 21 s, 17 s, 600 MiB."""
    with pytest.raises((InvalidRequest, TooLarge)) as caught:
        unpacked_beside(staging, BOMBS[name](FILES), 2**30)
    assert caught.value.param in ("file", "adapter_model.safetensors")
    assert sum(file.stat().st_size for file in staging.content.iterdir()) <= 2 * MIB


def test_a_large_archive_gets_the_time_it_needs(staging: Staging) -> None:
    """For what is unpacked and for what is passed over, on top of that for its structure."""
    random = np.random.default_rng(0).bytes(12 * MIB)
    files = {"README.md": random, "adapter_config.json": b"{}", "adapter_model.safetensors": random}
    for archive in (tarred(files), zipped(files, zipfile.ZIP_STORED)):
        assert unpacked_beside(staging, archive, 64 * MIB)["adapter_model.safetensors"] == random
        for file in staging.content.iterdir():
            file.unlink()


CONFINED = """
import runpy, socket, sys
runpy.run_path(sys.argv[1])["confine"](1 << 20)
tries = {
    "memory": lambda: bytes(256 << 20), "files": lambda: open("/etc/passwd"), "network": socket.socket,
    "disk": lambda: print("x" * (2 << 20), file=sys.stderr, flush=True),
}
for name, attempt in tries.items():
    try:
        attempt()
    except (MemoryError, OSError) as error:
        print(name, type(error).__name__)
"""


def test_what_the_process_cannot_do(tmp_path: Path) -> None:
    reader = Path(archive_reader.__file__)
    with (tmp_path / "file").open("wb") as file:
        command = [sys.executable, "-c", CONFINED, str(reader)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, check=True, text=True)
    assert done.stdout.split("\n")[:4] == [
        "memory MemoryError",
        "files OSError",
        "network OSError",
        "disk OSError",
    ]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    packed=st.sampled_from(
        [zipped(FILES), zipped(FILES, zipfile.ZIP_STORED), tarred(FILES), tarred(FILES, "w")]
    ),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4)), min_size=1, max_size=6),
)
def test_a_damaged_archive_is_read_or_refused(
    staging: Staging, packed: bytes, edits: list[tuple[float, bytes]]
) -> None:
    """Never another exception, and no name but the two."""
    archive = bytearray(packed)
    for at, data in edits:
        place = int(at * len(archive))
        archive[place : place + len(data)] = data
    with suppress(ChorusError):
        assert unpacked(staging, bytes(archive)).keys() == FILES.keys()
