"""The identity of an adapter: the digest of its two files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from server.errors import DamagedAdapter
from server.peft.format import CONFIG_NAME, WEIGHTS_NAME

_FILES = (CONFIG_NAME, WEIGHTS_NAME)


def digest_of(files: Iterable[tuple[str, int, str]]) -> str:
    """Of name, length and hex SHA-256 of the config and the weights.

    It is the SHA-256 of one line per file, so that lengths and contents cannot be shifted between files and
    each file can be hashed on its own.
    """
    framing = hashlib.sha256(b"chorus adapter 1\n")
    for name, size, sha in files:
        framing.update(f"{name} {size} {sha}\n".encode())
    return framing.hexdigest()


def read_digest(folder: Path) -> str:
    """Of what lies in `folder` now; reads all of it, and lets other threads run. Raises OSError."""
    files = []
    for name in _FILES:
        with (folder / name).open("rb") as file:
            sha = hashlib.file_digest(file, "sha256").hexdigest()
            files.append((name, file.tell(), sha))
    return digest_of(files)


def check_digest(folder: Path, digest: str) -> None:
    """Raises DamagedAdapter when the files are not those that the digest was made of, OSError."""
    if (found := read_digest(folder)) != digest:
        raise DamagedAdapter(
            f"The stored files of this adapter are damaged: their digest is {found[:12]}, not {digest[:12]}. "
            "Upload it again."
        )
