"""The real `chorus serve`, started the way a user starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "models" / "chorus-tiny"
ADAPTERS = REPOSITORY / "adapters"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A server process of its own; a context manager that stops it and everything it started."""

    def __init__(
        self, data_dir: Path, *flags: str, model: Path = MODEL, adapters: Path | None = ADAPTERS
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = data_dir.with_suffix(f".{self.port}.log")
        self.http = httpx.Client(base_url=self.url, timeout=120)
        self._command = [
            *(sys.executable, "-m", "server", "serve", "--model", str(model), "--data-dir", str(data_dir)),
            *("--port", str(self.port), "--dtype", "float32", "--kv-cache-bytes", "64MiB"),
            *("--arena-bytes", "64MiB", "--host-cache-bytes", "64MiB"),
            *(() if adapters is None else ("--adapters", str(adapters))),
            *flags,
        ]

    def __enter__(self) -> Server:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, cwd=REPOSITORY, start_new_session=True
            )
        try:
            self.wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def wait_ready(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.output()}")
            try:
                if self.http.get("/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"the server is not ready after {seconds} s:\n{self.output()}")

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def engine_pid(self) -> int:
        """The engine process: the only child of the server."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        (pid,) = [int(child) for child in children]
        return pid

    def complete(self, model: str, prompt: str | list[int], **fields: Any) -> dict[str, Any]:
        """One completion, greedy unless `fields` say otherwise; fails on an error answer."""
        body = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 64} | fields
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()
        return result

    def upload(self, name: str, folder: Path, method: str = "POST") -> httpx.Response:
        path = "/v1/adapters" if method == "POST" else f"/v1/adapters/{name}"
        files = [("files", (file.name, file.read_bytes())) for file in adapter_files(folder)]
        return self.http.request(method, path, data={"name": name}, files=files)


def adapter_files(folder: Path) -> Sequence[Path]:
    return [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
