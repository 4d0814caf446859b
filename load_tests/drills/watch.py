"""How long a server's event loop was held: another process asks it every few milliseconds.

`python -m load_tests.drills.watch HOST PORT` asks `/health/live` on one kept connection until its standard
input ends, then prints the longest answer in milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import Self

_EVERY_S = 0.01
_GIVEN_UP_S = 120.0


class Watch:
    """A context manager around what is watched; `longest_ms` is there after it."""

    def __init__(self, host: str, port: int) -> None:
        self._command = [sys.executable, "-m", "load_tests.drills.watch", host, str(port)]
        self._process: subprocess.Popen[str]
        self.longest_ms = 0.0

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it has begun
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        printed, _ = self._process.communicate()
        self.longest_ms = float(printed)


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
    writer.write(f"GET /health/live HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(int(length.partition(b":")[2]))


async def _longest_s(host: str, port: int, stop: threading.Event) -> float:
    longest = 0.0
    while not stop.is_set():
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):  # a server that is ending
            reader, writer = await asyncio.open_connection(host, port)
            with contextlib.closing(writer):
                while not stop.is_set():
                    began = time.monotonic()
                    try:
                        await asyncio.wait_for(_ask(reader, writer, f"{host}:{port}"), _GIVEN_UP_S)
                    finally:  # one that never came counts too
                        longest = max(longest, time.monotonic() - began)
                    await asyncio.sleep(_EVERY_S)
        await asyncio.sleep(_EVERY_S)
    return longest


def main() -> None:
    host, port = sys.argv[1], int(sys.argv[2])
    stop = threading.Event()

    def until_input_ends() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=until_input_ends, daemon=True).start()
    print("watching", flush=True)
    print(1e3 * asyncio.run(_longest_s(host, port, stop)))


if __name__ == "__main__":
    main()
