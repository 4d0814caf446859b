"""Counters in a file, changed in place before what they count is sent.

What a process has written is the kernel's, so `kill -9` takes nothing back; only a machine that stops loses
what was not on disk yet. A record is written whole, before anything of it is counted in place: one that a
kill cut off (its checksum is wrong) belongs to a request that has sent nothing.
"""

from __future__ import annotations

import os
import re
import struct
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from server.usage.records import Amount, UsageKey, UsageRow

_HEAD = struct.Struct("<II")  # length and CRC-32 of the key that follows the counters
_COUNTERS = struct.Struct("<4Q")
_NAME = re.compile(r"(\d{1,12})-([0-9a-f]{32})\.usage")
_MAX_KEY = 64 * 2**10  # bytes


class Journal:
    """The use in one hour, by one process. Not thread-safe. Raises OSError."""

    def __init__(self, folder: Path, hour: int) -> None:
        self.hour = hour
        self.id = uuid.uuid4().hex
        self._path = folder / f"{hour}-{self.id}.usage"
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._end = 0

    def add(self, key: UsageKey, amount: Amount) -> int:
        """A record of a key that has none; the place of its counters."""
        encoded = msgspec.msgpack.encode(key)
        record = _HEAD.pack(len(encoded), zlib.crc32(encoded)) + _COUNTERS.pack(*amount) + encoded
        if os.pwrite(self._file, record, self._end) != len(record):
            raise OSError("a record was cut off")  # the next one takes its place
        place = self._end + _HEAD.size
        self._end += len(record)
        return place

    def put(self, place: int, amount: Amount) -> None:
        os.pwrite(self._file, _COUNTERS.pack(*amount), place)

    def remove(self) -> None:
        """When all of it is kept elsewhere."""
        os.close(self._file)
        self._path.unlink(missing_ok=True)


def left_behind(folder: Path) -> list[Path]:
    """The journals in a folder, oldest first."""
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def read_journal(path: Path) -> Iterator[UsageRow]:
    """Every record that is whole."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return
    data, at = path.read_bytes(), 0
    while at + _HEAD.size + _COUNTERS.size <= len(data):
        length, checksum = _HEAD.unpack_from(data, at)
        key = data[at + _HEAD.size + _COUNTERS.size :][: min(length, _MAX_KEY)]
        if len(key) < length or zlib.crc32(key) != checksum:
            return
        amount = Amount(*_COUNTERS.unpack_from(data, at + _HEAD.size))
        yield UsageRow(int(match[1]), match[2], msgspec.msgpack.decode(key, type=UsageKey), amount)
        at += _HEAD.size + _COUNTERS.size + length
