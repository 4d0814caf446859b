"""The program that reads an archive which nobody vouches for; `archive.py` runs it as a process of its own.

It imports the standard library alone, so that it starts fast, and is bounded by the system whatever its
libraries do with what they read: CPU time, memory, the size of files. The archive is its standard input, the
files that it may write are open already, and it can open nothing more: no file, no socket.

Nothing is ever extracted by path: members are read as streams, recognised by their last name, and counted
while they are unpacked. One entry that tries to leave the archive refuses the whole of it.
"""

from __future__ import annotations

import codecs
import errno
import gzip
import io
import json
import os
import resource
import signal
import stat
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, BinaryIO

MEMORY_BYTES = 192 * 2**20  # of address space, most of it Python's own
CPU_S = 0.3  # for what is read of an archive's structure, and
CPU_BYTES_PER_S = 20e6  # for what is unpacked or passed over, on top

_CHUNK_BYTES = 1 << 19  # most that is read in one piece: of a member, of a header, of a zip's directory
_MAX_ENTRIES = 1000
_NESTED = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".zst")
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others may need much memory to unpack
_BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, ValueError, NotImplementedError,
    MemoryError, RecursionError,  # tarfile recurses over long-name headers
)  # fmt: skip


class Refused(Exception):
    """Why the archive is not taken. `kind`: invalid, too_large, pickle or full."""

    def __init__(self, kind: str, message: str, param: str = "file") -> None:
        super().__init__(message)
        self.answer = {"kind": kind, "message": message, "param": param}


@dataclass(frozen=True)
class Order:
    """What is wanted of an archive: as JSON, the program's one argument."""

    files: Mapping[str, tuple[int, int]]  # name -> an open file to write it to, and its most bytes
    most: int  # bytes, of all that comes out of the archive
    pickles: tuple[str, ...]  # ends of names

    @classmethod
    def parse(cls, text: str) -> Order:
        order = cls(**json.loads(text))
        return cls(order.files, order.most, tuple(order.pickles))


def unpack(archive: BinaryIO, order: Order) -> None:
    """Write the wanted files of `archive` (zip, tar or gzipped tar, told by content). Raises Refused."""
    head = archive.read(512)
    archive.seek(0)
    wanted = _Wanted(order)
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        _unpack_zip(archive, wanted)
    elif head[:2] == b"\x1f\x8b":
        with gzip.GzipFile(fileobj=archive) as unzipped:
            _unpack_tar(_ForwardStream(unzipped, order.most), wanted)
    elif head[257:262] == b"ustar":
        _unpack_tar(_ForwardStream(archive, order.most), wanted)
    else:
        raise _refuse("is neither a zip nor a tar archive")
    wanted.check_complete()


def _refuse(message: str) -> Refused:
    return Refused("invalid", f"The archive {message}.")


def _too_large(most: int) -> Refused:
    return Refused("too_large", f"The archive unpacks to more than {most} bytes.")


@contextmanager
def _broken_is_refused() -> Iterator[None]:
    """The reading side only: an OSError of writing must stay one."""
    try:
        yield
    except _BROKEN as error:
        raise _refuse("is damaged or cut short") from error


class _Wanted:
    """Which of the wanted files were found, and where."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._folder: str | None = None
        self._entries = 0
        self._pickle = False
        self._found: set[str] = set()

    def admit(self, name: str) -> str | None:
        """Judge one regular entry by its name; the wanted file that it is, or None to pass over it."""
        parent, _, last = name.rpartition("/")
        pickle = last.lower().endswith(self.order.pickles)
        self._pickle |= pickle
        if pickle and last.startswith("adapter_model"):
            raise Refused("pickle", "", last[:200])
        if last.lower().endswith(_NESTED):
            raise _refuse("holds another archive")
        if last not in self.order.files:
            return None
        if "/" in parent.removeprefix("./"):
            raise _refuse(f"has {last} deeper than one folder")
        if self._folder is not None and parent != self._folder:
            raise _refuse("has its adapter files in more than one folder")
        if last in self._found:
            raise _refuse(f"holds {last} twice")
        self._folder = parent
        self._found.add(last)
        return last

    def check_entry(self, name: str) -> None:
        """Refuse names that point out of the archive, wherever they stand in it."""
        self._entries += 1
        if self._entries > _MAX_ENTRIES:
            raise _refuse(f"has more than {_MAX_ENTRIES} entries")
        drive = len(name) > 1 and name[1] == ":"
        if name.startswith("/") or drive or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise _refuse("has an entry whose name points out of it")

    def check_complete(self) -> None:
        missing = [name for name in self.order.files if name not in self._found]
        if missing and self._pickle:
            raise Refused("pickle", "", missing[-1])
        if missing:
            raise Refused("invalid", f"The archive holds no {missing[0]}.", missing[0])

    def store(self, name: str, member: IO[bytes], count: Callable[[int], None]) -> None:
        target, left = self.order.files[name]
        while data := _read(member):
            count(len(data))
            left -= len(data)
            if left < 0:
                raise Refused("too_large", f"{name} is larger than {self.order.files[name][1]} bytes.", name)
            _write(target, data)
            _earn_time(len(data))


def _read(member: IO[bytes]) -> bytes:
    with _broken_is_refused():
        return member.read(_CHUNK_BYTES)


def _write(target: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(target, rest) :]


def _unpack_zip(file: BinaryIO, wanted: _Wanted) -> None:
    left = wanted.order.most

    def count(size: int) -> None:
        nonlocal left
        left -= size
        if left < 0:
            raise _too_large(wanted.order.most)

    with _broken_is_refused():
        archive = zipfile.ZipFile(_BoundedReads(file))
    with archive:
        chosen = [(info, last) for info in archive.infolist() if (last := _admit_zip(info, wanted))]
        if sum(info.file_size for info, _ in chosen) > wanted.order.most:
            raise _too_large(wanted.order.most)
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
        while stream.read(_CHUNK_BYTES):
            pass


class _BoundedReads:
    """A file for `zipfile`, which reads the archive's directory in one piece, however large it says it is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell
        self.seekable = file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > _CHUNK_BYTES:
            raise _refuse("has a directory of an unreasonable size")
        return self._file.read(_CHUNK_BYTES if size < 0 else size)


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
        if not 0 <= size <= _CHUNK_BYTES:
            raise _refuse("has a header of an unreasonable size")
        data = self._stream.read(size)
        self._position += len(data)
        if self._position > self._most:
            raise _too_large(self._most)
        return data

    def seek(self, position: int) -> int:
        if position < self._position:
            raise _refuse("is damaged or cut short")
        while data := self.read(min(_CHUNK_BYTES, position - self._position)):
            _earn_time(len(data))
        return self._position


def _earn_time(nbytes: int) -> None:
    """So many bytes were unpacked or passed over. Headers earn nothing: reading them is what may explode."""
    left, _ = signal.getitimer(signal.ITIMER_PROF)
    if left:
        signal.setitimer(signal.ITIMER_PROF, left + nbytes / CPU_BYTES_PER_S)


def confine(most: int) -> None:
    """Give up what reading an archive does not need, before anything of it is read.

    A signal whose default nobody changed ends the process when its time is over, also inside a library's
    compiled code.
    """
    for encoding in ("cp437", "ascii", "utf-8"):  # of names; read while files can still be opened
        codecs.lookup(encoding)
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, most),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    signal.setitimer(signal.ITIMER_PROF, CPU_S)


def main(order: Order) -> dict[str, str]:
    """Unpack standard input. Returns what is to be said of it: nothing, or a refusal's fields."""
    confine(order.most)
    try:
        unpack(os.fdopen(0, "rb"), order)
    except Refused as refusal:
        return refusal.answer
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return {"kind": "full", "message": "", "param": ""}
    return {}


if __name__ == "__main__":
    print(json.dumps(main(Order.parse(sys.argv[1]))))
