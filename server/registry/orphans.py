"""Stored content that no row names: garbage, or what a registry.db from a backup does not know yet."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from server.registry.modes import OWN_FOLDER

KEPT_DAYS = 30

_log = logging.getLogger(__name__)


class Orphans:
    """The folder in which it is set aside, to be removed some weeks later, or back in its place when a row
    names it again. One server at a time uses it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def bring_back(self, digest: str, target: Path) -> bool:
        """Whether it was here."""
        found = self._folder / digest
        if not found.is_dir() or target.exists():
            return False
        target.parent.mkdir(mode=OWN_FOLDER, exist_ok=True)
        found.rename(target)
        _log.info("stored adapter %s is named by registry.db again", digest[:12])
        return True

    def set_aside(self, orphans: Sequence[Path]) -> None:
        """Take these over, and remove what has been here for long."""
        if orphans:
            self._folder.mkdir(mode=OWN_FOLDER, exist_ok=True)
            _log.warning(
                "%d stored adapters that registry.db does not name lie in %s now, for %d days",
                len(orphans), self._folder, KEPT_DAYS,
            )  # fmt: skip
        for orphan in orphans:
            remove_any(self._folder / orphan.name)
            os.utime(orphan)  # from now on it waits
            orphan.rename(self._folder / orphan.name)
        for entry in list(self._expired()):
            remove_any(Path(entry.path))

    def _expired(self) -> Iterator[os.DirEntry[str]]:
        if not self._folder.is_dir():
            return
        oldest = time.time() - KEPT_DAYS * 86400
        for entry in entries_of(self._folder):
            if entry.stat(follow_symlinks=False).st_mtime < oldest:
                yield entry


def entries_of(folder: Path | os.DirEntry[str]) -> Iterator[os.DirEntry[str]]:
    """What is in it; no path is made for each of many thousands."""
    with os.scandir(folder) as entries:
        yield from entries


def holds_all(folder: os.DirEntry[str], names: Collection[str]) -> bool:
    """Whether these files are in it."""
    try:
        return sum(entry.name in names and entry.is_file() for entry in entries_of(folder)) == len(names)
    except OSError:
        return False


def remove_any(path: Path) -> None:
    """A folder, a file, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
