"""Signals, start-up and the end of the real server process."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.api.face_site import events

BODY = {"model": "base", "prompt": "hello", "max_tokens": 40}


@contextmanager
def process(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.api.serve_fake", str(folder), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as served:
        try:
            yield served
        finally:
            served.kill()


def url_of(served: subprocess.Popen[str]) -> str:
    """Reads the summary up to its last line, the address."""
    assert served.stdout is not None
    for line in served.stdout:
        if match := re.search(r"http://\S+", line):
            return match[0]
    raise AssertionError(served.stderr.read() if served.stderr else "")


def test_sigterm_under_load(tmp_path: Path) -> None:
    with process(tmp_path, "0.3") as served, httpx.Client(base_url=url_of(served)) as client:
        assert client.get("/health/ready").status_code == 200
        with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as stream:
            lines = stream.iter_lines()
            text = next(lines) + "\n"
            served.send_signal(signal.SIGTERM)
            text += "".join(line + "\n" for line in lines)
        assert events(text)[-1]["error"]["code"] == "shutting_down"
        assert served.wait(20) == 0


def test_while_it_drains_it_is_not_ready_and_a_second_signal_ends_it(tmp_path: Path) -> None:
    with (
        process(tmp_path, "600") as served,
        httpx.Client(base_url=url_of(served)) as client,
        client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as stream,
    ):
        lines = stream.iter_lines()  # kept: httpx hangs up when nobody holds it any more
        next(lines)
        served.send_signal(signal.SIGTERM)
        while client.get("/health/ready").status_code == 200:
            pass
        assert client.get("/health/live").status_code == 200
        refused = client.post("/v1/completions", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        served.send_signal(signal.SIGTERM)
        served.wait(20)


def test_idle_server_ends_with_0(tmp_path: Path) -> None:
    with process(tmp_path, "600") as served:
        url_of(served)
        served.send_signal(signal.SIGINT)
        assert served.wait(20) == 0


def test_engine_that_cannot_start(tmp_path: Path) -> None:
    with process(tmp_path, "1", "no\nmemory") as served:
        assert served.wait(30) == 1
        assert served.stderr is not None
        assert served.stderr.read() == "chorus: no memory\n"
