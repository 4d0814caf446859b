"""Takes the two adapter files out of a zip or tar archive that nobody vouches for.

Nothing is ever extracted by path: members are read as streams, recognised by their last name, and counted
while they are unpacked. One entry that tries to leave the archive refuses the whole of it.
"""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, BinaryIO

from server.config import Limits
from server.errors import InvalidRequest, TooLarge
from server.peft.format import CONFIG_NAME, WEIGHTS_NAME, is_pickle, pickle_refused
from server.registry.store import CHUNK_BYTES, FILE_NAMES, Staging

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")

_MAX_ENTRIES = 1000
_NESTED = (*ARCHIVE_SUFFIXES, ".gz", ".bz2", ".xz", ".7z", ".zst")
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others may need much memory to unpack
_BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, ValueError, NotImplementedError,
    RecursionError,  # tarfile recurses over long-name headers
)  # fmt: skip


def unpack(archive: BinaryIO, staging: Staging, limits: Limits) -> None:
    """Write the adapter's files of `archive` (zip, tar or gzipped tar, told by content) into `staging`.

    Raises InvalidRequest for an archive that is broken or unsafe, TooLarge when more than
    `max_unpacked_bytes` come out of it, UnsupportedMedia when its weights are a pickle. Where the archive
    itself is at fault, `param` is "file".
    """
    head = archive.read(512)
    archive.seek(0)
    wanted, most = _Wanted(staging), limits.max_unpacked_bytes
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        _unpack_zip(archive, wanted, most)
    elif head[:2] == b"\x1f\x8b":
        with gzip.GzipFile(fileobj=archive) as unzipped:
            _unpack_tar(_ForwardStream(unzipped, most), wanted)
    elif head[257:262] == b"ustar":
        _unpack_tar(_ForwardStream(archive, most), wanted)
    else:
        raise _refuse("is neither a zip nor a tar archive")
    wanted.check_complete()


def _refuse(message: str) -> InvalidRequest:
    return InvalidRequest(f"The archive {message}.", param="file")


def _too_large(most: int) -> TooLarge:
    return TooLarge(f"The archive unpacks to more than {most} bytes.", param="file")


@contextmanager
def _broken_is_refused() -> Iterator[None]:
    """The reading side only: an OSError of writing must stay one."""
    try:
        yield
    except _BROKEN as error:
        raise _refuse("is damaged or cut short") from error


@dataclass
class _Wanted:
    """Which of the two files were found, and where."""

    staging: Staging
    folder: str | None = None
    entries: int = 0
    pickle: bool = False

    def __post_init__(self) -> None:
        self._files: set[str] = set()

    def admit(self, name: str) -> str | None:
        """Judge one regular entry by its name; the adapter file that it is, or None to pass over it."""
        parent, _, last = name.rpartition("/")
        pickle = is_pickle(last)
        self.pickle |= pickle
        if pickle and last.startswith("adapter_model"):
            raise pickle_refused(last[:200])
        if last.lower().endswith(_NESTED):
            raise _refuse("holds another archive")
        if last not in FILE_NAMES:
            return None
        if "/" in parent.removeprefix("./"):
            raise _refuse(f"has {last} deeper than one folder")
        if self.folder is not None and parent != self.folder:
            raise _refuse("has its adapter files in more than one folder")
        if last in self._files:
            raise _refuse(f"holds {last} twice")
        self.folder = parent
        self._files.add(last)
        return last

    def check_entry(self, name: str) -> None:
        """Refuse names that point out of the archive, wherever they stand in it."""
        self.entries += 1
        if self.entries > _MAX_ENTRIES:
            raise _refuse(f"has more than {_MAX_ENTRIES} entries")
        drive = len(name) > 1 and name[1] == ":"
        if name.startswith("/") or drive or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise _refuse("has an entry whose name points out of it")

    def check_complete(self) -> None:
        if WEIGHTS_NAME not in self._files and self.pickle:
            raise pickle_refused(WEIGHTS_NAME)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if name not in self._files:
                raise InvalidRequest(f"The archive holds no {name}.", param=name)

    def store(self, name: str, member: IO[bytes], count: Callable[[int], None]) -> None:
        with self.staging.sink(name) as sink:
            while True:
                with _broken_is_refused():
                    data = member.read(CHUNK_BYTES)
                if not data:
                    break
                count(len(data))
                sink.write(data)


def _unpack_zip(file: BinaryIO, wanted: _Wanted, max_bytes: int) -> None:
    left = max_bytes

    def count(size: int) -> None:
        nonlocal left
        left -= size
        if left < 0:
            raise _too_large(max_bytes)

    with _broken_is_refused():
        archive = zipfile.ZipFile(_BoundedReads(file))
    with archive:
        chosen = [(info, last) for info in archive.infolist() if (last := _admit_zip(info, wanted))]
        if sum(info.file_size for info, _ in chosen) > max_bytes:
            raise _too_large(max_bytes)
        for info, last in chosen:
            with _broken_is_refused():
                member = archive.open(info)
            with member:
                wanted.store(last, member, count)


def _admit_zip(info: zipfile.ZipInfo, wanted: _Wanted) -> str | None:
    wanted.check_entry(info.orig_filename)
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _refuse("has an entry that is no plain file")
    if info.flag_bits & 0x1:
        raise _refuse("is encrypted")
    if info.is_dir() or kind == stat.S_IFDIR:
        return None
    if info.compress_type not in _ZIP_METHODS:
        raise _refuse("is packed with something else than deflate")
    return wanted.admit(info.filename)


def _unpack_tar(stream: _ForwardStream, wanted: _Wanted) -> None:
    with _broken_is_refused():
        archive = tarfile.TarFile(fileobj=stream)  # type: ignore[arg-type]  # all that tarfile calls
    while True:
        with _broken_is_refused():
            entry = archive.next()
        if entry is None:
            break
        wanted.check_entry(entry.name)
        if entry.type == tarfile.DIRTYPE:
            continue
        if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.sparse is not None:
            raise _refuse("has an entry that is no plain file")
        if last := wanted.admit(entry.name):
            with _broken_is_refused():
                member = archive.extractfile(entry)
            if member is None:
                raise _refuse("is damaged or cut short")
            with member:
                wanted.store(last, member, lambda size: None)  # the stream itself counts
    with _broken_is_refused():  # to the end, where gzip keeps its checksum
        while stream.read(CHUNK_BYTES):
            pass


class _BoundedReads:
    """A file for `zipfile`, which reads the archive's directory in one piece, however large it says it is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell
        self.seekable = file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > CHUNK_BYTES:
            raise _refuse("has a directory of an unreasonable size")
        return self._file.read(CHUNK_BYTES if size < 0 else size)


class _ForwardStream:
    """A stream for `tarfile` that only goes forward and stops at `most` bytes, read or passed over.

    `tarfile` reads extended headers in one piece, however large they say they are; a piece is bounded too.
    """

    def __init__(self, stream: io.BufferedIOBase | BinaryIO, most: int) -> None:
        self._stream = stream
        self._most = most
        self._position = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= CHUNK_BYTES:
            raise _refuse("has a header of an unreasonable size")
        data = self._stream.read(size)
        self._position += len(data)
        if self._position > self._most:
            raise _too_large(self._most)
        return data

    def seek(self, position: int) -> int:
        if position < self._position:
            raise _refuse("is damaged or cut short")
        while self._position < position and self.read(min(CHUNK_BYTES, position - self._position)):
            pass
        return self._position
