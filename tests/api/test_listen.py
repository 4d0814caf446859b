"""Signals, start-up and the end of the real server process."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

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
        if match := re.search(r"https?://\S+", line):
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
        upload = client.put("/v1/adapters/x", files={"files": ("a.zip", b"")})
        assert (upload.status_code, upload.json()["error"]["code"]) == (503, "shutting_down")
        assert client.delete("/v1/adapters/x").status_code == 503
        assert client.get("/v1/adapters").status_code == 200
        served.send_signal(signal.SIGTERM)
        assert served.wait(20) == 128 + signal.SIGTERM
        assert served.stderr is not None
        assert served.stderr.read().splitlines()[-1] == "chorus: SIGTERM came again: ends at once"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_each_signal_drains(tmp_path: Path, number: signal.Signals) -> None:
    with process(tmp_path, "600") as served, httpx.Client(base_url=url_of(served)) as client:
        with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            served.send_signal(number)
            while client.get("/health/ready").status_code == 200:
                pass
        assert served.wait(20) == 0  # nobody is left to wait for


def test_a_hang_up_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """`nohup chorus serve &`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with process(tmp_path, "600") as served, httpx.Client(base_url=url_of(served)) as client:
            served.send_signal(signal.SIGHUP)
            for _ in range(20):
                assert client.get("/health/ready").status_code == 200
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_engine_loads(tmp_path: Path, number: signal.Signals) -> None:
    with process(tmp_path, "600", "-") as served:
        assert served.stdout is not None
        assert served.stdout.readline() == "loading\n"
        served.send_signal(number)
        assert served.wait(20) == 0
        assert served.stderr is not None
        assert "Traceback" not in served.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_there_is_a_server(number: signal.Signals) -> None:
    code = (
        "import os, signal; from server.api.signals import *\n"
        f"with handling_signals(end_during_start): os.kill(os.getpid(), {int(number)})"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, f"chorus: ended by {number.name} during its start\n")


def test_an_upload_that_outlasts_the_drain_ends_without_a_traceback(tmp_path: Path) -> None:
    with process(tmp_path, "0") as served:
        port = int(url_of(served).rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as upload:
            head = "PUT /v1/adapters/x HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n"
            upload.sendall(f"{head}content-type: multipart/form-data; boundary=x\r\n\r\n--x\r\n".encode())
            assert httpx.get(f"http://127.0.0.1:{port}/health/live").status_code == 200
            served.send_signal(signal.SIGTERM)
            answer = b"".join(iter(lambda: upload.recv(4096), b""))
        assert (b" 503 " in answer, b"shutting_down" in answer) == (True, True)
        assert served.wait(20) == 0
        assert served.stderr is not None
        assert "Traceback" not in served.stderr.read()


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_standard_output_that_is_closed(tmp_path: Path, closed: tuple[int, ...]) -> None:
    """Its number must not become that of the registry or a socket."""
    code = (
        "import os, sys\n"
        "from server.api.output import open_standard_files, say\n"
        "open_standard_files()\n"
        f"fd = os.open({str(tmp_path / 'registry')!r}, os.O_CREAT | os.O_RDWR)\n"
        "print('lost'); say('lost')\n"
        "os.system('echo lost; echo lost >&2')\n"
        "sys.exit(7 if fd > 2 else 8)"
    )
    shell = "exec " + " ".join(f"{fd}>&-" for fd in closed) + ' "$0" -c "$1"'
    assert subprocess.run(["bash", "-c", shell, sys.executable, code], check=False).returncode == 7
    assert (tmp_path / "registry").read_bytes() == b""


def test_a_reader_of_the_output_that_leaves(tmp_path: Path) -> None:
    """`chorus serve | head -1`."""
    with process(tmp_path, "600") as served:
        assert served.stdout is not None
        served.stdout.close()
        assert served.stderr is not None
        assert "the summary could not be printed" in served.stderr.readline()
        served.send_signal(signal.SIGTERM)
        assert served.wait(20) == 0
        assert served.stderr.read() == ""


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
