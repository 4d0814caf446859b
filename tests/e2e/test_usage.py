"""`kill -9` of the real server and of its engine under streams: the bill is what the clients got."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx

from tests.e2e.server import Server

BODY = {
    "prompt": "one two three",
    "max_tokens": 400,
    "ignore_eos": True,
    "stream": True,
    "return_token_ids": True,
}


class Client:
    """Streams until its server is gone; `got`: the requests that gave it something, and their tokens."""

    def __init__(self, url: str, model: str) -> None:
        self.requests = self.prompt = self.completion = 0
        self.errors: list[str] = []
        self._url = url
        self._model = model
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with suppress(httpx.HTTPError), httpx.Client(timeout=60) as http:
            while True:
                with http.stream(
                    "POST", f"{self._url}/v1/completions", json=BODY | {"model": self._model}
                ) as answer:
                    if answer.status_code != 200:
                        return
                    for line in answer.iter_lines():
                        if line.startswith("data: {"):
                            self._take(json.loads(line.removeprefix("data: ")))

    def _take(self, chunk: dict[str, object]) -> None:
        if "error" in chunk:
            self.errors.append(str(chunk["error"]))
            return
        for choice in chunk["choices"]:  # type: ignore[attr-defined]  # JSON
            if "prompt_token_ids" in choice:
                self.requests += 1
                self.prompt += len(choice["prompt_token_ids"])
            self.completion += len(choice["token_ids"])


def got(clients: list[Client]) -> list[int]:
    return [sum(getattr(c, name) for c in clients) for name in ("requests", "prompt", "completion")]


def counted(server: Server) -> list[int]:
    (line,) = server.http.get("/v1/usage?group_by=").json()["data"]
    return [line["requests"], line["prompt_tokens"], line["completion_tokens"]]


def test_the_bill_after_kills(tmp_path: Path) -> None:
    """Of the engine first, then of the server. A stream may have been counted one event further than its
    client got before a kill of the server, and never less."""
    data, clients = tmp_path / "data", []
    with Server(data) as server:
        model = server.http.get("/v1/models").json()["data"][0]["id"]
        clients = [Client(server.url, name) for name in (model, "upper") for _ in range(2)]
        time.sleep(1.5)
        os.kill(server.engine_pid(), signal.SIGKILL)
        for client in clients:
            client.join()
        assert any(client.errors for client in clients)
        assert counted(server) == got(clients)
        server.wait_ready()
        clients += [Client(server.url, name) for name in (model, "upper") for _ in range(2)]
        time.sleep(1.5)
        server.process.kill()
        server.process.wait(30)
        for client in clients:
            client.join()
    assert any((data / "usage").iterdir())
    with Server(data) as server:
        requests, prompt, completion = got(clients)
        seen = counted(server)
        assert requests > 4
        assert requests <= seen[0] <= requests + 4
        assert 0 <= seen[1] - prompt == (seen[0] - requests) * (prompt // requests)
        assert completion <= seen[2] <= completion + 4 * 2
        print("counted", seen, "got", got(clients))
