"""Content by digest: what a kill, a full disk and concurrent holders leave behind."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from server.errors import InsufficientStorage
from server.registry.orphans import KEPT_DAYS
from server.registry.store import ContentStore, DataFolderError, Staging, open_regular
from tests.registry import adapter_files


@pytest.fixture
def store(data_dir: Path) -> Iterator[ContentStore]:
    store = ContentStore(data_dir)
    yield store
    store.close()


def filled(store: ContentStore, seed: int = 0) -> Staging:
    staging = store.staging()
    for name, data in adapter_files.files(seed=seed).items():
        sink = staging.sink(name)
        sink.write(data)
        sink.close()
    return staging


def stored(store: ContentStore, seed: int = 0) -> str:
    staging = filled(store, seed)
    digest = staging.seal()
    store.add(staging, digest)
    staging.discard()
    return digest


def test_the_digest_is_of_both_files(store: ContentStore) -> None:
    lines = b"chorus adapter 1\n"
    for name, data in adapter_files.files().items():
        lines += f"{name} {len(data)} {hashlib.sha256(data).hexdigest()}\n".encode()
    assert filled(store).seal() == hashlib.sha256(lines).hexdigest()


@pytest.mark.parametrize("in_kernel", [True, False])
def test_a_copied_file_has_the_digest_of_an_uploaded_one(
    store: ContentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "another file system")

    if not in_kernel:
        monkeypatch.setattr(os, "copy_file_range", refuse)
    folder = adapter_files.write(tmp_path / "source")
    staging = store.staging()
    for file in folder.iterdir():
        source = open_regular(file)
        staging.copy(file.name, source)
        os.close(source)
    assert staging.seal() == filled(store).seal()


def test_only_plain_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("pipe", "link", "nothing", "."):
        with pytest.raises(OSError):  # noqa: PT011  # whichever kind: each is refused in its own way
            open_regular(tmp_path / name)


def test_files_go_with_their_last_holder(store: ContentStore, data_dir: Path) -> None:
    digest = stored(store)
    assert stored(store) == digest
    assert store.hold_all([digest]) == {digest}
    store.drop(digest)
    store.drop(digest)
    assert adapter_files.on_disk(data_dir) == {digest}
    store.drop(digest)
    assert not store.holds(digest)
    assert adapter_files.on_disk(data_dir) == set()  # out of sight at once
    store.close()
    assert adapter_files.staged(data_dir) == []
    assert store.hold_all([digest]) == set()


def test_what_is_stored_again_before_its_files_went_stays(store: ContentStore, data_dir: Path) -> None:
    other, digest = stored(store, 1), stored(store, 2)
    busy, again = threading.Event(), threading.Event()
    store.drop(other, then=lambda: (busy.set(), again.wait(10)))
    assert busy.wait(10)
    store.drop(digest, on_loop=True)  # waits for the other
    assert stored(store, 2) == digest
    again.set()
    store.close()
    assert adapter_files.on_disk(data_dir) == {digest}


def test_a_sweep_keeps_what_is_held_and_sets_the_rest_aside(store: ContentStore, data_dir: Path) -> None:
    kept, orphan = stored(store, 1), stored(store, 2)
    filled(store, 3)  # never published
    (data_dir / "staging" / "stray").write_text("x")
    store.close()
    with closing(ContentStore(data_dir)) as fresh:
        assert fresh.hold_all([kept]) == {kept, orphan}
        fresh.sweep()
        assert adapter_files.on_disk(data_dir) == {kept}
        assert adapter_files.staged(data_dir) == []
        assert [folder.name for folder in (data_dir / "orphans").iterdir()] == [orphan]
        assert fresh.hold_all([kept, orphan]) == {kept, orphan}
        assert adapter_files.on_disk(data_dir) == {kept, orphan}  # a row names it again
    assert list((data_dir / "orphans").iterdir()) == []


def test_what_was_set_aside_goes_some_weeks_later(store: ContentStore, data_dir: Path) -> None:
    older, newer = stored(store, 1), stored(store, 2)
    store.close()
    with closing(ContentStore(data_dir)) as fresh:
        fresh.sweep()
    long_ago = time.time() - (KEPT_DAYS + 1) * 86400
    os.utime(data_dir / "orphans" / older, (long_ago, long_ago))
    with closing(ContentStore(data_dir)) as fresh:
        fresh.sweep()
    assert [folder.name for folder in (data_dir / "orphans").iterdir()] == [newer]


def test_files_without_both_halves_are_missing(store: ContentStore, data_dir: Path) -> None:
    digest = stored(store, 1)
    (store.folder(digest) / "adapter_config.json").unlink()
    assert store.hold_all([digest]) == set()


def test_a_disk_without_room_is_told_at_once(
    store: ContentStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InsufficientStorage):
        store.staging(expected_bytes=10**18)
    assert adapter_files.staged(data_dir) == []


def test_a_full_disk_at_the_rename_holds_nothing(
    store: ContentStore, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    staging = filled(store)
    digest = staging.seal()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(InsufficientStorage):
            store.add(staging, digest)
    assert not store.holds(digest)
    store.add(staging, digest)
    staging.discard()
    assert adapter_files.on_disk(data_dir) == {digest}


def modes(folder: Path) -> dict[str, int]:
    """Permissions of everything in a data folder, and of it."""
    return {
        str(path.relative_to(folder)): path.lstat().st_mode & 0o777
        for path in (folder, *folder.rglob("*"))
        if not path.is_symlink()
    }


@pytest.mark.parametrize("mask", [0, 0o022])
def test_other_users_may_not_look_in(data_dir: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with closing(adapter_files.open_registry(data_dir / "new")) as registry:
            with registry.publication(create=True, replace=False) as publication:
                publication.begin("a")
                for name, data in adapter_files.files().items():
                    with publication.staging.sink(name) as sink:
                        sink.write(data)
                publication.publish("test")
            assert len(modes(data_dir / "new")) >= 9
            assert {mode & 0o077 for mode in modes(data_dir / "new").values()} == {0}
    finally:
        os.umask(before)


def test_a_folder_of_before_is_closed_to_others(data_dir: Path, tmp_path: Path) -> None:
    with closing(ContentStore(data_dir)) as store:
        stored(store)
    outside = tmp_path / "outside"
    outside.write_text("not ours")
    outside.chmod(0o644)
    (data_dir / "adapters" / "link").symlink_to(outside)
    for path in (data_dir, *data_dir.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o777 if path.is_dir() else 0o644)
    ContentStore(data_dir).close()
    assert {mode & 0o077 for mode in modes(data_dir).values()} == {0}
    assert outside.stat().st_mode & 0o777 == 0o644


def test_a_folder_for_everybody_stays_so(data_dir: Path) -> None:
    data_dir.mkdir(exist_ok=True)
    data_dir.chmod(0o1777)
    ContentStore(data_dir).close()
    assert data_dir.stat().st_mode & 0o7777 == 0o1777
    assert (data_dir / "adapters").stat().st_mode & 0o777 == 0o700


def test_the_lock_is_not_made_through_a_link(data_dir: Path, tmp_path: Path) -> None:
    data_dir.mkdir(exist_ok=True)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (data_dir / "lock").symlink_to(precious)
    with pytest.raises(DataFolderError, match="Too many levels of symbolic links"):
        ContentStore(data_dir)
    assert precious.read_text() == "precious"
