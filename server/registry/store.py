"""Content-addressed adapter files: a folder's name is the digest of what is in it, never a client's name.

<data_dir>/lock                          held by the one server that uses this folder
<data_dir>/staging/<random>/             what is being received; swept at start
<data_dir>/adapters/<d[:2]>/<digest>/    adapter_config.json, adapter_model.safetensors; never change
<data_dir>/orphans/<digest>/             the same of what no row names, for a while
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, Self

from server.errors import InsufficientStorage, InvalidRequest, TooLarge
from server.peft.digest import digest_of
from server.peft.format import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME
from server.registry.modes import OWN_FILE, OWN_FOLDER, close_to_others
from server.registry.orphans import Orphans, entries_of, holds_all, remove_any

FILE_NAMES = (CONFIG_NAME, WEIGHTS_NAME)
CHUNK_BYTES = 1 << 20

_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_COPY_IN_KERNEL = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


class DataFolderError(RuntimeError):
    """The data folder cannot be used as it is; one sentence for the operator, with the file and a remedy."""


class DataDirInUseError(DataFolderError):
    """Another server holds the lock of this data folder."""


@contextmanager
def full_disk_is_refused() -> Iterator[None]:
    """Raises InsufficientStorage where the operating system has "no space left"."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise InsufficientStorage("The server's disk is full; nothing was stored.") from error
        raise


class Sink:
    """One file being written: counted and hashed on the way."""

    def __init__(self, path: Path, most: int | None = None) -> None:
        self._file: BinaryIO = _create(path)
        self._hash = hashlib.sha256()
        self._name = path.name
        self._most = most
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        self.size += len(data)
        if self._most is not None and self.size > self._most:
            raise TooLarge(f"{self._name} is larger than {self._most} bytes.", param=self._name)
        self._hash.update(data)
        self._file.write(data)

    def close(self) -> None:
        self._file.close()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Staging:
    """The private folder of one publication, until the store takes its `content` over."""

    def __init__(self, root: Path) -> None:
        self._root = root / uuid.uuid4().hex
        self.content = self._root / "content"
        root.mkdir(mode=OWN_FOLDER, parents=True, exist_ok=True)
        self._root.mkdir(mode=OWN_FOLDER)
        self.content.mkdir(mode=OWN_FOLDER)
        self._open: list[Sink] = []
        self._sinks: dict[str, Sink] = {}

    @property
    def scratch(self) -> Path:
        """Where an archive may lie while it is unpacked; never published."""
        return self._root / "archive"

    @property
    def spoilt(self) -> Path:
        """Where content goes that this one takes the place of; never published."""
        return self._root / "spoilt"

    def sink(self, name: str) -> Sink:
        """Begin one of the two files; close it at its end. Raises InvalidRequest when it comes twice."""
        if name not in FILE_NAMES:
            raise ValueError(name)
        if name in self._sinks:
            raise InvalidRequest(f"{name} was sent twice.", param=name)
        self._sinks[name] = self._track(
            Sink(self.content / name, MAX_CONFIG_BYTES if name == CONFIG_NAME else None)
        )
        return self._sinks[name]

    def scratch_sink(self) -> Sink:
        return self._track(Sink(self.scratch))

    def unhashed(self, name: str) -> BinaryIO:
        """One of the two files, for somebody else to write; hashed when it is sealed."""
        return _create(self.content / name)

    def copy(self, name: str, source: int) -> None:
        """Copy an open file in, inside the kernel where the file systems can (a reflink costs nothing)."""
        with _create(self.content / name) as target:
            if not _copy_in_kernel(source, target.fileno()):
                while data := os.read(source, CHUNK_BYTES):
                    target.write(data)

    def seal(self) -> str:
        """Hash what was not hashed while it came, sync both files to disk and return the content's digest."""
        for sink in self._open:
            sink.close()
        files = []
        for name in FILE_NAMES:
            path = self.content / name
            hashed = self._sinks.get(name)
            with path.open("rb") as file:
                sha = hashed.hexdigest() if hashed else hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
                size = os.fstat(file.fileno()).st_size
            files.append((name, size, sha))
        _fsync_folder(self.content)
        return digest_of(files)

    def discard(self) -> None:
        """Remove whatever is left. Idempotent."""
        for sink in self._open:
            with suppress(OSError):  # a full disk may refuse the last flush of a file that goes anyway
                sink.close()
        self._open.clear()
        shutil.rmtree(self._root, ignore_errors=True)

    def _track(self, sink: Sink) -> Sink:
        self._open.append(sink)
        return sink


class ContentStore:
    """The folders by digest, and how many holders (rows and leases) each has. Thread-safe.

    Raises DataFolderError where there can be no such folder, DataDirInUseError, naming the lock file, when
    another server uses it.
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self._folders = data_dir / "adapters"
        self._staging = data_dir / "staging"
        self._orphans = Orphans(data_dir / "orphans")
        try:
            data_dir.parent.mkdir(parents=True, exist_ok=True)
            for folder in (data_dir, self._folders, self._staging):
                folder.mkdir(mode=OWN_FOLDER, exist_ok=True)
            self._lock_fd = _lock(data_dir / "lock")
            close_to_others(data_dir)
        except OSError as error:
            raise DataFolderError(
                f"{error.filename}: {error.strerror}: the data folder must be one that this server can read "
                "and write; mend it, or choose another --data-dir."
            ) from error
        self._lock = threading.Lock()  # of the counts alone: the event loop takes it, so no disk may hold it
        self._moving = threading.Lock()  # around what brings content in or takes it out; taken first
        self._holders: Counter[str] = Counter()
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="adapter-remover")

    def close(self) -> None:
        """Finish removals and let the next server in."""
        with self._moving, self._lock:
            lock_fd, self._lock_fd = self._lock_fd, -1
        self._remover.shutdown()
        if lock_fd >= 0:
            os.close(lock_fd)

    def folder(self, digest: str) -> Path:
        return self._folders.joinpath(digest[:2], digest)

    def staging(self, expected_bytes: int = 0) -> Staging:
        """A new staging folder. Raises InsufficientStorage when `expected_bytes` cannot fit."""
        if expected_bytes > shutil.disk_usage(self._staging).free:
            raise InsufficientStorage("There is no room on the server's disk for an upload of this size.")
        with full_disk_is_refused():
            return Staging(self._staging)

    def add(self, staging: Staging, digest: str, *, mend: bool = False) -> None:
        """Take over sealed content and hold it once for the caller; equal content is kept only once.

        `mend`: what lies there now is not to be trusted, and goes. On return it survives a power failure.
        Raises InsufficientStorage.
        """
        target = self.folder(digest)
        with self._lock:
            self._holders[digest] += 1
        try:
            with full_disk_is_refused():
                target.parent.mkdir(mode=OWN_FOLDER, exist_ok=True)
                with self._moving:  # against a removal of the same digest
                    if mend and target.exists():
                        target.rename(staging.spoilt)
                    if not target.exists():
                        staging.content.rename(target)
                _fsync_folder(target.parent)
                _fsync_folder(self._folders)
        except BaseException:
            self.drop(digest)
            raise

    def hold_all(self, digests: Iterable[str]) -> set[str]:
        """At start: one more holder each of content that is there already, or was set aside. Returns what is:
        of others, files are missing."""
        digests = list(digests)
        there = set(self._complete())
        there.update(
            digest for digest in set(digests) - there if self._orphans.bring_back(digest, self.folder(digest))
        )
        with self._lock:
            self._holders.update(digest for digest in digests if digest in there)
        return there

    def drop(self, digest: str, then: Callable[[], None] | None = None, *, on_loop: bool = False) -> None:
        """One holder fewer. With the last one the files go: out of sight at once, unlinked in a thread; where
        the event loop calls (`on_loop`), both in a thread.

        `then` is called when that is done, from another thread, or at once when others hold it.
        """
        with nullcontext() if on_loop else self._moving:
            with self._lock:
                self._holders[digest] -= 1
                last = self._holders[digest] <= 0
                if last:
                    del self._holders[digest]
                goes = last and self._lock_fd >= 0  # else closed: the folder may be another server's by now
                if goes and on_loop:
                    self._remover.submit(self._remove, digest, then)
            if goes and not on_loop:
                self._remover.submit(self._unlink, self._take_out(digest), then)
        if not goes and then is not None:
            then()

    def holds(self, digest: str) -> bool:
        """Whether anything holds this content."""
        with self._lock:
            return digest in self._holders

    def stored(self) -> Iterator[os.DirEntry[str]]:
        """The folders of all content that lies here, held or not."""
        for shard in entries_of(self._folders):
            if shard.is_dir(follow_symlinks=False):
                yield from entries_of(shard)

    def sweep(self) -> None:
        """At start: remove what a killed server left in staging, set aside content that nothing holds."""
        for left in self._staging.iterdir():
            remove_any(left)
        orphans = [Path(entry) for entry in self.stored() if entry.name not in self._holders]
        self._orphans.set_aside(orphans)

    def _complete(self) -> Iterator[str]:
        """The digests whose two files lie here."""
        return (folder.name for folder in self.stored() if holds_all(folder, FILE_NAMES))

    def _remove(self, digest: str, then: Callable[[], None] | None) -> None:
        with self._moving:
            trash = self._take_out(digest)
        self._unlink(trash, then)

    def _take_out(self, digest: str) -> Path:
        """Out of sight, to the folder that this returns; unless somebody has come to hold it meanwhile."""
        trash = self._staging / uuid.uuid4().hex
        with suppress(OSError):  # what cannot go now is swept at the next start
            if not self.holds(digest):
                self.folder(digest).rename(trash)
        return trash

    def _unlink(self, trash: Path, then: Callable[[], None] | None) -> None:
        shutil.rmtree(trash, ignore_errors=True)
        if then is not None:
            then()


def create_private(path: Path, flags: int = 0) -> int:
    """Open a file for reading and writing, made for this user alone if it is new; the caller closes it.

    Never through a link. Raises OSError.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flags, OWN_FILE)


def open_regular(path: Path) -> int:
    """Open a file for reading without following a last symlink, or waiting for a pipe; the caller closes it.

    Raises OSError; FileNotFoundError also for what is no regular file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, "not a regular file")
    return fd


def _copy_in_kernel(source: int, target: int) -> bool:
    """Copy to the end of `source`; False where that cannot be, with both files where it stopped."""
    if not hasattr(os, "copy_file_range"):  # it is Linux's own
        return False
    try:
        while os.copy_file_range(source, target, 1 << 30):
            pass
    except OSError as error:
        if error.errno not in _NO_COPY_IN_KERNEL:
            raise
        return False
    return True


def _lock(path: Path) -> int:
    fd = create_private(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise DataDirInUseError(
            f"{path} is locked by another server (process {holder}). Stop it, or choose another --data-dir."
        ) from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def _create(path: Path) -> BinaryIO:
    return os.fdopen(create_private(path, os.O_EXCL), "wb")


def _fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
