"""The frozen base model as the HTTP face sees it: a folder, a name, a fingerprint. No weights."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from server.config import Settings, user_data_dir
from server.errors import ChorusError

_WEIGHTS = "*.safetensors"
_FILES = ("*.json", "*.jinja")
_PIECE_BYTES = 512


class _Tensor(msgspec.Struct):
    """An entry of a safetensors header; the one that holds metadata has no offsets."""

    data_offsets: tuple[int, int] = (-1, -1)


class StartError(ChorusError):
    """The server cannot start as it was asked to; the message is for the operator, one line."""


@dataclass(frozen=True)
class BaseModel:
    """One base model in a local folder."""

    name: str  # what clients put in `model`
    folder: Path
    tokenizer_folder: Path
    fingerprint: str  # hex sha256; equal for equal weights files, of which it reads a piece of each tensor

    @classmethod
    def resolve(cls, settings: Settings) -> BaseModel:
        """Finds the model of `settings.model`, a local folder or a hub id (fetched if it is not here yet).

        Raises StartError when there is no such folder, model, config or tokenizer folder.
        """
        folder = Path(settings.model).expanduser()
        name = settings.served_model_name or settings.model
        if folder.is_dir():
            folder = folder.resolve()
            name = settings.served_model_name or folder.name
        else:
            folder = _fetch(settings)
        _check_config(folder)
        return cls(
            name=name,
            folder=folder,
            tokenizer_folder=_tokenizer_folder(settings, folder),
            fingerprint=_fingerprint(folder, settings),
        )


def default_data_dir(fingerprint: str) -> Path:
    """Where a server of this base model keeps its registry, unless `--data-dir` says otherwise."""
    return user_data_dir() / "chorus" / fingerprint[:16]


def _fetch(settings: Settings) -> Path:
    parts = settings.model.split("/")
    looks_like_hub_id = len(parts) == 2 and all(part and not part.startswith((".", "~")) for part in parts)
    if not looks_like_hub_id:
        raise StartError(f"--model {settings.model}: there is no such folder")
    from huggingface_hub import snapshot_download  # slow to import, and only hub models need it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_FILES] if settings.load_format == "dummy" else [*_FILES, _WEIGHTS]
    try:
        fetched = snapshot_download(settings.model, revision=settings.revision, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise StartError(
            f"--model {settings.model}: no such folder, and the hub has no answer: {reason}"
        ) from error
    return Path(str(fetched))


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise StartError(f"--model {folder}: the folder has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartError(f"--model {folder}: config.json is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise StartError(f"--model {folder}: config.json is not a JSON object")


def _tokenizer_folder(settings: Settings, folder: Path) -> Path:
    if settings.tokenizer is None:
        return folder
    tokenizer_folder = Path(settings.tokenizer).expanduser()
    if not tokenizer_folder.is_dir():
        raise StartError(f"--tokenizer {settings.tokenizer}: there is no such folder")
    return tokenizer_folder.resolve()


def _fingerprint(folder: Path, settings: Settings) -> str:
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if settings.load_format == "dummy":
        digest.update(f"dummy {settings.seed}".encode())
        return digest.hexdigest()
    weights = sorted(folder.glob(_WEIGHTS))
    if not weights:
        raise StartError(
            f"--model {folder}: the folder has no .safetensors file (--load-format dummy needs none)"
        )
    for path in weights:
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            for piece in _pieces(file):
                digest.update(piece)
    return digest.hexdigest()


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """The header of a weights file, and of each tensor its beginning, middle and end: models of the same
    shapes differ there, because training moves all weights."""
    (header_length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
    header = file.read(min(header_length, 100 * 2**20))
    yield header
    for start, end in _tensors(header):
        for place in (start, (start + end) // 2, end - _PIECE_BYTES):
            file.seek(8 + header_length + max(start, place))
            yield file.read(min(_PIECE_BYTES, end - start))


def _tensors(header: bytes) -> list[tuple[int, int]]:
    """Where each lies behind the header. A header that is none, whoever loads the weights will refuse."""
    try:
        entries = msgspec.json.decode(header, type=dict[str, _Tensor])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return []
    return sorted(entry.data_offsets for entry in entries.values() if entry.data_offsets[0] >= 0)
