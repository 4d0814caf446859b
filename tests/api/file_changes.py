"""Which thread changes something on the disk, as Python's audit events tell it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "shutil.move"}

_seen: list[tuple[int, str]] | None = None


def _hook(event: str, _: object) -> None:
    if _seen is not None and event in _EVENTS:
        _seen.append((threading.get_ident(), event))


sys.addaudithook(_hook)  # there for good, and deaf outside `changes_here`


@contextmanager
def changes_here() -> Iterator[list[str]]:
    """What this thread changes within; complete after it. Fails where no thread changed anything."""
    global _seen
    here: list[str] = []
    _seen = []
    try:
        yield here
        assert _seen, "nothing was changed at all"
        here += [event for thread, event in _seen if thread == threading.get_ident()]
    finally:
        _seen = None
