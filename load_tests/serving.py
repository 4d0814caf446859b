"""A server process for the length of a measurement or a test, started as its user starts it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx


class ServerProcess:
    """A context manager: the process runs and is ready inside, and has ended after.

    `process` is it, its output goes to `log`. Raises RuntimeError with the log's end when it ends or is not
    ready in time.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        ready_within_s: float = 1800.0,
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes]
        self.ready_s = 0.0  # from its start until it was ready to serve
        self.command = list(command)
        self._log = log
        self._env = {**os.environ, **(env or {})}
        self._limit_s = ready_within_s

    @property
    def pid(self) -> int:
        return self.process.pid

    def __enter__(self) -> Self:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self._env, start_new_session=True
            )
        try:
            self.wait_ready()
        except BaseException:
            self.__exit__()
            raise
        self.ready_s = time.monotonic() - began
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def wait_ready(self) -> None:
        """Until it answers that it is ready to serve; raises as the class says."""
        deadline = time.monotonic() + self._limit_s
        with httpx.Client(base_url=self.url, timeout=30) as client:
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self._tail()}")
                try:
                    if client.get("/health/ready").status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.05)
        raise RuntimeError(f"the server was not ready after {self._limit_s:g} s:\n{self._tail()}")

    def counter(self, name: str) -> float:
        """The value of a counter without labels, by its name on /metrics."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        found = re.search(rf"^{name} (\S+)$", text, re.M)
        if found is None:
            raise RuntimeError(f"{self.url}/metrics has no {name}")
        return float(found[1])

    def log_text(self) -> str:
        """All of its output so far."""
        return self._log.read_text(errors="replace")

    def _tail(self) -> str:
        return self.log_text()[-2000:]


def chorus_serve(
    model: Path, data_dir: Path, adapters: Path, flags: Sequence[str], log: Path
) -> ServerProcess:
    """`chorus serve` of this Python's environment on a free port, its base model named `base`.

    Raises FileNotFoundError when `chorus` is not installed there.
    """
    chorus = Path(sys.executable).with_name("chorus")
    if not chorus.exists():
        raise FileNotFoundError(f"{chorus} is missing: `make setup`, then use .venv/bin/python")
    port = free_port()
    command = [
        *(str(chorus), "serve", "--model", str(model), "--served-model-name", "base"),
        *("--adapters", str(adapters), "--data-dir", str(data_dir), "--port", str(port)),
        *flags,
    ]
    return ServerProcess(command, port, log)


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def children_of(pid: int) -> list[int]:
    """Processes that it started, or that came to it when their own parent ended."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def engine_of(server: int) -> int:
    """The engine process of a `chorus serve`: of its children the one that has one itself, the spare."""
    children = children_of(server)
    (engine,) = children if len(children) == 1 else filter(children_of, children)
    return engine
