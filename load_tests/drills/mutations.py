"""Sound files and texts made unsound, as chance will: the same `Random` makes the same again."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
from collections.abc import Callable
from random import Random
from typing import Any

from load_tests.drills.archives import tarred, zipped

Files = dict[str, bytes]  # of an adapter, by name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_NASTY = (
    "1e999", "-1e999", "NaN", "-0.0", "1e-320", "9223372036854775808", "18446744073709551616", "-1",
    "1" + "0" * 400, "true", "null", "[]", "{}", '""', r'"\ud800"', r'"\u0000"', '"\u202e"',
    "[[[[[[[[]]]]]]]]", '{"a": {"a": {"a": 1}}}', '"' + "x" * 5000 + '"', "0.1", '"0"', "[null]", "01", "'x'",
)  # fmt: skip
_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null')
_DTYPES = ("F64", "F32", "F16", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "", "f32", 7)
_NUMBERS = (0, 1, -1, 3, 2**31, 2**53, 2**63, 2**64, 0.5, None, "1")


def flipped(raw: bytes, random: Random) -> bytes:
    """Some bits the other way."""
    changed = bytearray(raw)
    for _ in range(random.choice((1, 1, 2, 8, 64)) if raw else 0):
        changed[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut(raw: bytes, random: Random) -> bytes:
    """Its beginning."""
    return raw[: random.randrange(len(raw) + 1)]


def spliced(raw: bytes, random: Random) -> bytes:
    """A piece of it in the place of another, longer or shorter."""
    a, b, c, d = (random.randrange(len(raw) + 1) for _ in range(4))
    return raw[: min(a, b)] + raw[min(c, d) : max(c, d)][: 2**20] + raw[max(a, b) :]


def blanked(raw: bytes, random: Random) -> bytes:
    """A piece of it zeros, or ones."""
    start = random.randrange(len(raw) + 1)
    length = min(random.choice((1, 4, 64, 4096)), len(raw) - start)
    return raw[:start] + random.choice((b"\0", b"\xff")) * length + raw[start + length :]


_DAMAGES: tuple[Callable[[bytes, Random], bytes], ...] = (flipped, cut, spliced, blanked)


def damaged(raw: bytes, random: Random) -> bytes:
    """Bytes of any kind."""
    return random.choice(_DAMAGES)(raw, random)


def damaged_json(text: bytes, random: Random) -> bytes:
    """A value of it something else, mostly; else as bytes of any kind."""
    values = list(_VALUE.finditer(text))
    if not values or random.random() < 0.3:
        return damaged(text, random)
    at = random.choice(values)
    return text[: at.start()] + random.choice(_NASTY).encode() + text[at.end() :]


def _entry_changed(header: dict[str, Any], random: Random) -> None:
    """A tensor's name, type, shape or place."""
    name = random.choice(sorted(header))
    entry = header[name]
    match random.choice(("name", "dtype", "shape", "offsets", "field", "gone", "twin")):
        case "name":
            header[damaged(name.encode(), random).decode(errors="replace")] = header.pop(name)
        case "dtype":
            entry["dtype"] = random.choice(_DTYPES)
        case "shape":
            entry["shape"] = random.choice(
                (entry["shape"][::-1], [*entry["shape"], 1], [], [random.choice(_NUMBERS)] * 2, [0, 8])
            )
        case "offsets":
            entry["data_offsets"][random.randrange(2)] = random.choice(_NUMBERS)
        case "field":
            entry[random.choice(("dtype", "shape", "data_offsets", "more"))] = random.choice(_NUMBERS)
        case "gone":
            del header[name]
        case "twin":
            header[f"{name}.default"] = entry


def mutated_weights(raw: bytes, random: Random) -> bytes:
    """A safetensors file: its header's entries, its header's bytes, its length, or anything."""
    size = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + size], raw[8 + size :]
    kind = random.random()
    if kind < 0.5:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for _ in range(random.choice((1, 1, 3))):
            if entries:
                _entry_changed(entries, random)
        header = json.dumps(entries).encode()
    elif kind < 0.75:
        header = damaged_json(header, random)
    elif kind < 0.9:
        return damaged(raw, random)
    else:
        return random.choice((0, 1, size - 1, size + 1, 2**31, 2**63)).to_bytes(8, "little") + raw[8:]
    return len(header).to_bytes(8, "little") + header + data


def mutated_files(files: Files, random: Random) -> Files:
    """One of the two, seldom both."""
    config, weights = files[CONFIG], files[WEIGHTS]
    which = random.random()
    if which < 0.3 or which > 0.9:
        config = damaged_json(config, random)
    if which >= 0.3:
        weights = mutated_weights(weights, random)
    return {CONFIG: config, WEIGHTS: weights}


def _odd_tar(files: Files, random: Random) -> bytes:
    """Entries of odd names, kinds and sizes among the two."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=random.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    ) as archive:
        for name, data in [*files.items(), ("odd", b"")]:
            info = tarfile.TarInfo(
                random.choice((name, name, f"a/{name}", f"../{name}", "x" * 300, name * 2))
            )
            info.type = random.choice((*[tarfile.REGTYPE] * 6, tarfile.SYMTYPE, tarfile.DIRTYPE, b"?"))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def mutated_archive(files: Files, random: Random) -> tuple[str, bytes]:
    """A name, and a zip, tar or tar.gz: damaged, in what is packed, or of damaged files."""
    kind = random.choice(("zip", "tar", "tar.gz"))
    if random.random() < 0.2:
        files = mutated_files(files, random)
    if kind == "zip":
        return "a.zip", damaged(zipped(files, random.choice((0, 8))), random)
    tar = _odd_tar(files, random) if random.random() < 0.4 else damaged(tarred(files, "w"), random)
    if kind == "tar":
        return "a.tar", tar
    packed = gzip.compress(tar, 1)
    return "a.tar.gz", damaged(packed, random) if random.random() < 0.5 else packed
