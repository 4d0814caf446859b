"""The real `chorus serve`, started the way a user starts it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from load_tests.serving import ServerProcess, engine_of, free_port

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "models" / "chorus-tiny"
ADAPTERS = REPOSITORY / "adapters"


class Server(ServerProcess):
    """A small server of its own, and calls to it."""

    def __init__(
        self, data_dir: Path, *flags: str, model: Path = MODEL, adapters: Path | None = ADAPTERS
    ) -> None:
        port = free_port()
        command = [
            *(sys.executable, "-m", "server", "serve", "--model", str(model), "--data-dir", str(data_dir)),
            *("--port", str(port), "--dtype", "float32", "--kv-cache-bytes", "64MiB"),
            *("--arena-bytes", "64MiB", "--host-cache-bytes", "64MiB"),
            *(() if adapters is None else ("--adapters", str(adapters))),
            *flags,
        ]
        super().__init__(command, port, data_dir.with_suffix(f".{port}.log"), ready_within_s=120)
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def __exit__(self, *error: object) -> None:
        self.http.close()
        super().__exit__(*error)

    def engine_pid(self) -> int:
        return engine_of(self.pid)

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
