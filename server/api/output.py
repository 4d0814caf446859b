"""Standard input, output and error of the server, which may be closed, or end while it runs."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def say(text: str) -> None:
    """One line to standard error, if anybody still reads it."""
    with suppress(OSError):
        print(f"chorus: {' '.join(text.split())}", file=sys.stderr, flush=True)


def open_standard_files() -> None:
    """Puts /dev/null where one of the three is closed.

    Else the next file or socket that is opened gets its number, and whatever is printed, here or in the
    engine process, goes there.
    """
    while True:
        fd = os.open(os.devnull, os.O_RDWR)
        if fd > 2:
            os.close(fd)
            break
        os.set_inheritable(fd, True)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # for the process's life


def discard_output() -> None:
    """Standard output goes nowhere from now on: what is in its buffer is no error at the end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
