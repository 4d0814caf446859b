"""`chorus adapters` against a server on a local port."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import Result
from typer.testing import CliRunner

from load_tests.drills.archives import tarred
from server.adapters_cli import app
from tests.api.adapter_app import Site
from tests.local_server import serving
from tests.registry import adapter_files

Run = Callable[..., Result]


@pytest.fixture
def run(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a command against the site."""
    monkeypatch.setenv("COLUMNS", "200")
    with serving(site.app) as address:
        yield lambda *words: CliRunner().invoke(app, [*words, "--server", address])


def test_the_journey_of_an_adapter(run: Run, site: Site, tmp_path: Path) -> None:
    folder = adapter_files.write(tmp_path / "source", adapter_files.files(seed=1))
    uploaded = run("upload", "team/sql", str(folder))
    assert uploaded.exit_code == 0, uploaded.output
    assert "version 1, rank 4" in uploaded.output

    again = run("upload", "team/sql", str(folder))
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr == "error: The adapter `team/sql` exists already.\n"

    archive = tmp_path / "new.tar.gz"
    archive.write_bytes(tarred(adapter_files.files(seed=2)))
    replaced = run("upload", "team/sql", str(archive), "--replace", "--json")
    assert json.loads(replaced.stdout)["version"] == 2

    listed = run("list")
    assert "team/sql" in listed.stdout
    assert "ready" in listed.stdout
    assert len(json.loads(run("list", "--json").stdout)["data"]) == 1

    shown = run("show", "team/sql")
    for text in ("team/sql", "q_proj, v_proj", "3.84% of the base", "1.54 kB", " s ago"):
        assert text in shown.stdout
    digest = site.registry.current_versions()[0].digest
    assert digest[:10] in shown.stdout
    assert json.loads(run("show", "team/sql", "--json").stdout)["digest"] == digest

    deleted = run("delete", "team/sql")
    assert deleted.stdout == "team/sql is deleted\n"
    assert json.loads(run("list", "--json").stdout)["data"] == []


def test_a_delete_that_waits_says_so(
    run: Run, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.adapters.routes._DELETE_WAIT_S", 0.01)
    run("upload", "a", str(adapter_files.write(tmp_path / "source")))
    with site.registry.acquire("a"):
        assert "when the running ones have finished" in run("delete", "a").stdout


def test_errors_are_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    bad = adapter_files.write(tmp_path / "bad", adapter_files.files() | {"adapter_config.json": b"{"})
    for words, message in (
        (("show", "nothing"), "does not exist"),
        (("delete", "nothing"), "does not exist"),
        (("upload", "a", str(tmp_path / "empty")), "holds no adapter_config.json"),
        (("upload", "a", str(bad)), "not valid JSON"),
        (("upload", "a b", str(bad)), "`name` must be"),
    ):
        result = run(*words)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


def test_a_server_that_is_not_there(free_address: str) -> None:
    result = CliRunner().invoke(app, ["list", "--server", free_address])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: no answer from {free_address}")


def test_an_address_that_is_none() -> None:
    result = CliRunner().invoke(app, ["list", "--server", "nonsense"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


@pytest.fixture
def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


EVIL = "\x1b]0;owned\x07\x1b[2Jred\x9b31m\u202eback\r\n"
HARMLESS = "]0;owned[2Jred31mback"


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, object], None]:
    """Has the server answer as given."""

    def answer(status: int, body: object) -> None:
        response = httpx.Response(status, json=body)
        monkeypatch.setattr(httpx.Client, "request", lambda *_, **__: response)

    return answer


def test_what_a_server_says_cannot_command_the_terminal(hostile: Callable[[int, object], None]) -> None:
    version = {"version": 1, "digest": EVIL, "rank": 4, "bytes": 1, "residency": EVIL, "requests": 0}
    version |= {"tokens": 0, "created_at": 0}
    adapter = {"name": EVIL, "state": EVIL, "residency": EVIL, "description": EVIL, "requests": 0}
    adapter |= {"last_used": None, EVIL: EVIL, "versions": [version]}
    for words, body in (
        (("list",), {"data": [adapter]}),
        (("show", "a"), adapter),
        (("delete", "a"), adapter),
    ):
        hostile(200, body)
        shown = CliRunner().invoke(app, words)
        assert shown.exit_code == 0, shown.output
        assert not set(shown.output) & set("\x1b\x07\x9b\u202e\r"), words
    hostile(400, {"error": {"message": EVIL}})
    failed = CliRunner().invoke(app, ["list"])
    assert failed.stderr.strip() == f"error: {HARMLESS}"
