"""How long a server's event loop was held: another process asks it every few milliseconds.

`python -m load_tests.drills.watch HOST PORT PID` asks `/health/live` on one kept connection until its
standard input ends, then prints two figures in milliseconds: the longest hold, which is an answer's time
without that in which the main thread of the server (PID) or of this process was ready to run and had no core,
as the kernel counts it; and the longest answer with it. Other work on the machine is in the second alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

MOST_HELD_MS = 50.0
_EVERY_S = 0.01
_GIVEN_UP_S = 120.0


@dataclass(frozen=True)
class Hold:
    """How long the loop kept one client waiting, and how long the longest answer took altogether."""

    loop_ms: float = 0.0
    answer_ms: float = 0.0

    def __str__(self) -> str:
        told = f" ({self.answer_ms:.0f} with waiting for a core)" if self.answer_ms > MOST_HELD_MS else ""
        return f"{self.loop_ms:.0f}{told}"


class Watch:
    """A context manager around what is watched; `hold` is there after it. `pid`: of the server."""

    def __init__(self, host: str, port: int, pid: int) -> None:
        self._command = [sys.executable, "-m", "load_tests.drills.watch", host, str(port), str(pid)]
        self._process: subprocess.Popen[str]
        self.hold = Hold()

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # the kernel shares the cores out by session: what plays is busy, too
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it has begun
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        printed, _ = self._process.communicate()
        self.hold = Hold(*map(float, printed.split()))


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
    writer.write(f"GET /health/live HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(int(length.partition(b":")[2]))


async def _longest(host: str, port: int, pid: int, stop: threading.Event) -> Hold:
    longest = Hold()
    while not stop.is_set():
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):  # a server that is ending
            reader, writer = await asyncio.open_connection(host, port)
            with contextlib.closing(writer):
                while not stop.is_set():
                    began, starved = time.monotonic(), _starved_ms(pid)
                    try:
                        await asyncio.wait_for(_ask(reader, writer, f"{host}:{port}"), _GIVEN_UP_S)
                    finally:  # one that never came counts too
                        took_ms = 1e3 * (time.monotonic() - began)
                        loop_ms = took_ms - max(_starved_ms(pid) - starved, 0.0)  # below 0 where it has died
                        longest = Hold(max(longest.loop_ms, loop_ms), max(longest.answer_ms, took_ms))
                    await asyncio.sleep(_EVERY_S)
        await asyncio.sleep(_EVERY_S)
    return longest


def _starved_ms(pid: int) -> float:
    """How long the main threads of the server and of this process have waited for a core so far."""
    nanoseconds = 0
    for each in (str(pid), "self"):
        with contextlib.suppress(OSError, IndexError):  # it is gone, or this kernel does not count
            nanoseconds += int(Path(f"/proc/{each}/schedstat").read_text().split()[1])
    return nanoseconds / 1e6


def main() -> None:
    host, port, pid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    stop = threading.Event()

    def until_input_ends() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=until_input_ends, daemon=True).start()
    print("watching", flush=True)
    hold = asyncio.run(_longest(host, port, pid, stop))
    print(hold.loop_ms, hold.answer_ms)


if __name__ == "__main__":
    main()
