"""Adapters that lie on this machine: a folder in PEFT layout, or an archive of one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from server.config import Limits
from server.errors import ChorusError, Forbidden, InvalidRequest, NotFound
from server.peft.format import WEIGHTS_NAME, holds_pickle, pickle_refused
from server.registry.sources.archive import ARCHIVE_SUFFIXES, unpack
from server.registry.store import FILE_NAMES, Staging, full_disk_is_refused, open_regular


class LocalSource:
    """`file:/path`, `file:///path` or a plain path to what lies under one of `roots`. Links may not lead out.

    What lies outside of them is Forbidden whether or not it exists, so that nothing can be probed.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots

    def fill(self, uri: str, staging: Staging, limits: Limits) -> str:
        """See `Source`. An archive is known by the end of its name, as in an upload."""
        path = self._resolve(_path_of(uri))
        if path.is_dir():
            copy_folder(path, staging, self._roots)
        elif path.name.lower().endswith(ARCHIVE_SUFFIXES):
            _unpack(path, staging, limits)
        else:
            raise _missing()
        return f"file:{path}"

    def _resolve(self, path: str) -> Path:
        if not path or "\0" in path:
            raise InvalidRequest("The source names no folder and no archive.", param="source")
        outside = Forbidden("The source lies outside the folders this server may read.", param="source")
        try:
            resolved = Path(path).resolve()
        except (OSError, RuntimeError):  # too long, or a loop of links
            raise outside from None
        if not _is_under(resolved, self._roots):
            raise outside
        return resolved


def copy_folder(folder: Path, staging: Staging, roots: Sequence[Path] | None = None) -> None:
    """Copy the two adapter files of a folder in. With `roots`, links may not lead out of them.

    Raises InvalidRequest when one is missing, UnsupportedMedia when there are only pickles, Forbidden,
    InsufficientStorage.
    """
    for name in FILE_NAMES:
        file = (folder / name).resolve()
        if roots is not None and not _is_under(file, roots):
            raise Forbidden(f"{name} lies outside the folders this server may read.", param=name)
        try:
            source = _opened(file)
        except OSError:
            if name == WEIGHTS_NAME and holds_pickle(folder):
                raise pickle_refused(name) from None
            raise InvalidRequest(f"The folder has no readable {name}.", param=name) from None
        with source, full_disk_is_refused():
            staging.copy(name, source.fileno())


def _unpack(path: Path, staging: Staging, limits: Limits) -> None:
    try:
        archive = _opened(path)
    except OSError:
        raise _missing() from None
    with archive, full_disk_is_refused(), _named_source():
        unpack(archive, staging, limits)


@contextmanager
def _named_source() -> Iterator[None]:
    """Refusals of the archive itself name the field that it came by; those of a file in it name the file."""
    try:
        yield
    except ChorusError as error:
        if error.param == "file":
            error.param = "source"
        raise


def _opened(path: Path) -> BinaryIO:
    return os.fdopen(open_regular(path), "rb")


def _path_of(uri: str) -> str:
    """Only a URI is unquoted: a plain path may hold a `%`."""
    scheme, colon, rest = uri.partition(":")
    return unquote(rest.removeprefix("//")) if colon and scheme == "file" else uri


def _is_under(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root.resolve()) for root in roots)


def _missing() -> NotFound:
    return NotFound("There is no such folder or archive.", param="source")
