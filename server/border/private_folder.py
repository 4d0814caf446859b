"""A folder for the sockets of one engine process, and the end of those that killed servers left."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "chorus-"
_LOCK = "lock"
_LONGEST = 79  # of the folder around it: the system takes 107 bytes as a socket's name, and ours end with 28


def _place() -> str:
    """The folder for temporary files, or the system's own where a socket's name would be too long."""
    chosen = tempfile.gettempdir()
    return chosen if len(os.fsencode(chosen)) <= _LONGEST else "/tmp"


class PrivateFolder:
    """Among the temporary files, mode 0700; `cleanup` removes it. Making one sweeps the dead ones.

    A living one is known by the lock that its process holds, not by a process id, which another may have by
    now, or another container at the same time.
    """

    def __init__(self) -> None:
        sweep()
        self.name = tempfile.mkdtemp(prefix=_PREFIX, dir=_place())
        unseen = Path(self.name, f".{_LOCK}")
        self._lock_fd = os.open(unseen, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        unseen.rename(Path(self.name, _LOCK))  # whoever sees it, sees it locked

    def cleanup(self) -> None:
        """Idempotent."""
        shutil.rmtree(self.name, ignore_errors=True)
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)


def sweep() -> None:
    """Remove this user's folders whose servers are dead."""
    for lock in Path(_place()).glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            if lock.parent.is_symlink() or lock.parent.stat().st_uid != os.geteuid():
                continue
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, or not ours to open
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
        except BlockingIOError:
            pass  # in use
        finally:
            os.close(fd)
