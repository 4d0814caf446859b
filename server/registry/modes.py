"""Who may look into a data folder: its user alone."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

OWN_FOLDER, OWN_FILE = 0o700, 0o600  # modes; not by `umask`, which is the whole process's

logger = logging.getLogger(__name__)


def close_to_others(data_dir: Path) -> None:
    """Take away what other users may do in a data folder of before, or one that was made by hand.

    A folder that all may write to by design (`/tmp`) stays as it is; so does what is somebody else's, with
    a warning.
    """
    mode = data_dir.lstat().st_mode
    if not stat.S_ISLNK(mode) and not mode & stat.S_ISVTX:
        _close(data_dir, mode)
    own = {"lock", "registry.db", "registry.db-wal", "registry.db-shm", "registry.reserve"}
    trees = {"adapters", "staging", "orphans"}
    with os.scandir(data_dir) as entries:
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False)
            if entry.name in trees and is_folder:
                _close_tree(entry)
            elif entry.name in own and entry.is_file(follow_symlinks=False):
                _close(entry, entry.stat(follow_symlinks=False).st_mode)


def _close_tree(folder: os.DirEntry[str]) -> None:
    """Many thousands of entries: nothing is made of one but its mode."""
    try:
        _close(folder, folder.stat(follow_symlinks=False).st_mode)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    _close_tree(entry)
                elif not entry.is_symlink():
                    _close(entry, entry.stat(follow_symlinks=False).st_mode)
    except OSError as error:
        logger.warning("%s stays open to other users: %s", folder.path, error.strerror)


def _close(path: os.PathLike[str], mode: int) -> None:
    """`mode`: what it is now."""
    if not mode & 0o077:
        return
    try:
        os.chmod(path, OWN_FOLDER if stat.S_ISDIR(mode) else OWN_FILE)
    except OSError as error:
        logger.warning("%s stays open to other users: %s", os.fspath(path), error.strerror)
