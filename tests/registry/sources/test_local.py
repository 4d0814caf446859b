"""Adapters of this machine by their URI: which may be read, and what comes of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from load_tests.drills.archives import tarred, zipped
from server.errors import ChorusError, Forbidden, InvalidRequest, NotFound, TooLarge, UnsupportedMedia
from server.registry.sources.table import Sources
from server.registry.store import Staging
from tests.lora.adapter_folder import LIMITS
from tests.registry import adapter_files

FILES = adapter_files.files()
PICKLES = {"adapter_config.json": b"{}", "adapter_model.bin": b"x"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Staging]:
    staging = Staging(tmp_path / "staging")
    yield staging
    staging.discard()


def sources(*roots: Path) -> Sources:
    return Sources.of(adapter_files.settings(allowed_lora_roots=roots))


def filled(staging: Staging) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in staging.content.iterdir()}


@pytest.mark.parametrize("uri", [str, "file:{}".format, Path.as_uri])
def test_a_folder(root: Path, staging: Staging, uri) -> None:  # type: ignore[no-untyped-def]
    folder = adapter_files.write(root / "a b", FILES)
    assert sources(root).fill(uri(folder), staging, LIMITS) == f"file:{folder}"
    assert filled(staging) == FILES


def test_only_a_uri_is_unquoted(root: Path, staging: Staging) -> None:
    folder = adapter_files.write(root / "100%25", FILES)
    with pytest.raises(NotFound):
        sources(root).fill(f"file:{folder}", staging, LIMITS)
    assert sources(root).fill(str(folder), staging, LIMITS) == f"file:{folder}"


def test_the_adapters_folder_is_a_root(root: Path, staging: Staging) -> None:
    folder = adapter_files.write(root / "a", FILES)
    table = Sources.of(adapter_files.settings(adapters=root))
    assert table.fill(str(folder), staging, LIMITS) == f"file:{folder}"


@pytest.mark.parametrize(("name", "archive"), [("a.zip", zipped(FILES)), ("A.TGZ", tarred(FILES))])
def test_an_archive(root: Path, staging: Staging, name: str, archive: bytes) -> None:
    (root / name).write_bytes(archive)
    (root / "link.zip").symlink_to(root / name)
    assert sources(root).fill(f"file:{root}/link.zip", staging, LIMITS) == f"file:{root / name}"
    assert filled(staging) == FILES


@pytest.mark.parametrize(
    ("archive", "kind", "param"),
    [
        (b"neither", InvalidRequest, "source"),
        (zipped({"../adapter_config.json": b"{}"}), InvalidRequest, "source"),
        (zipped(FILES | {"adapter_model.safetensors": bytes(2 << 20)}), TooLarge, "source"),
        (zipped({"adapter_config.json": b"{}"}), InvalidRequest, "adapter_model.safetensors"),
        (zipped(PICKLES), UnsupportedMedia, "adapter_model.bin"),
    ],
)
def test_archives_that_are_refused(
    root: Path, staging: Staging, archive: bytes, kind: type[ChorusError], param: str
) -> None:
    (root / "a.zip").write_bytes(archive)
    with pytest.raises(kind) as caught:
        sources(root).fill(str(root / "a.zip"), staging, LIMITS)
    assert caught.value.param == param
    assert str(root) not in caught.value.message


def test_an_archive_is_unpacked_up_to_the_limit(root: Path, staging: Staging) -> None:
    (root / "a.tar.gz").write_bytes(tarred(FILES))
    with pytest.raises(TooLarge):
        sources(root).fill(str(root / "a.tar.gz"), staging, replace(LIMITS, max_unpacked_bytes=1000))


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("{root}/missing", NotFound),
        ("{root}/missing.zip", NotFound),
        ("{root}/notes.txt", NotFound),
        ("{root}/pipe.zip", NotFound),
        ("{root}/..", Forbidden),
        ("{root}/../missing.zip", Forbidden),
        ("{root}/out", Forbidden),
        ("{root}/out.zip", Forbidden),
        ("file:{root}/../..", Forbidden),
        ("file:{root}/%2e%2e", Forbidden),
        ("relative", Forbidden),
        ("file://elsewhere/x", Forbidden),
        ("http://x/y", Forbidden),
        ("ftp://x/y", InvalidRequest),
        ("hf://x/y", InvalidRequest),
        ("", InvalidRequest),
    ],
)
def test_what_may_not_be_read(
    root: Path, tmp_path: Path, staging: Staging, source: str, kind: type[ChorusError]
) -> None:
    (root / "notes.txt").write_text("no adapter")
    os.mkfifo(root / "pipe.zip")
    (tmp_path / "outside.zip").write_bytes(zipped(FILES))
    (root / "out.zip").symlink_to(tmp_path / "outside.zip")
    (root / "out").symlink_to(adapter_files.write(tmp_path / "outside", FILES))
    with pytest.raises(kind) as caught:
        sources(root).fill(source.format(root=root), staging, LIMITS)
    assert caught.value.param == "source"
    assert filled(staging) == {}


def test_without_roots_nothing_is_read(root: Path, staging: Staging) -> None:
    with pytest.raises(Forbidden):
        sources().fill(str(adapter_files.write(root / "a", FILES)), staging, LIMITS)
