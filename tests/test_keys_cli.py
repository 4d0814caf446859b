"""`chorus keys`, on a data folder and against a server on a local port."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.access.keyring import Keyring
from server.cli import app
from server.registry.data_folder import DataFolder
from tests.api.adapter_app import Site
from tests.local_server import serving
from tests.registry import adapter_files

runner = CliRunner()


@pytest.fixture
def address(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("COLUMNS", "200")
    with serving(site.app) as address:
        yield address


def run(*words: str, env: dict[str, str] | None = None) -> str:
    """What a command prints when it does well."""
    result = runner.invoke(app, words, env=env)
    assert result.exit_code == 0, result.output
    return result.stdout


def failure(*words: str, env: dict[str, str] | None = None) -> str:
    result = runner.invoke(app, words, env=env)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_keys_of_a_stopped_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    at = ("--data-dir", str(tmp_path / "data"))
    assert "first key needs" in failure("keys", "create", *at)
    key = run("keys", "create", "--scope", "admin", "--name", "mine", *at).strip()
    made = json.loads(run("keys", "create", "--tenant", "acme", "--expires", "90d", "--json", *at))
    assert (made["tenant"], made["scopes"]) == ("acme", ["infer"])
    assert made["expires_at"] - made["created_at"] == pytest.approx(90 * 86400)
    listed = run("keys", "list", *at)
    for text in ("mine", "acme", "admin", "infer", "active", key.split("-")[1]):
        assert text in listed
    assert key not in listed
    assert run("keys", "revoke", made["id"], *at) == f"key {made['id']} is revoked\n"
    states = [key["state"] for key in json.loads(run("keys", "list", "--json", *at))["data"]]
    assert states == ["active", "revoked"]
    with closing(DataFolder(tmp_path / "data")) as folder, closing(Keyring([], folder.keys)) as keyring:
        assert keyring.identify(key).may("admin")


def test_a_folder_that_a_server_uses_or_that_is_none(site: Site, tmp_path: Path) -> None:
    assert "a server uses" in failure("keys", "create", "--data-dir", str(site.data_dir))
    assert "no registry.db" in failure("keys", "list", "--data-dir", str(tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()
    (tmp_path / "file").write_text("x")
    assert "file" in failure("keys", "create", "--data-dir", str(tmp_path / "file"))


def test_keys_and_adapters_of_a_running_server(address: str, site: Site, tmp_path: Path) -> None:
    at = ("--server", address)
    admin = run("keys", "create", "--scope", "admin", *at).strip()
    assert "needs an API key" in failure("keys", "list", *at)
    assert "not valid" in failure("keys", "list", *at, "--api-key", "nonsense")
    env = {"CHORUS_API_KEY": admin}
    uploader = run("keys", "create", "--scope", "upload", "--tenant", "acme", *at, env=env).strip()
    folder = adapter_files.write(tmp_path / "source", adapter_files.files(seed=1))
    run("adapters", "upload", "mine", str(folder), *at, env={"CHORUS_API_KEY": f"{uploader},another"})
    assert "mine" in run("adapters", "list", *at, "--api-key", uploader)
    assert "mine" not in run("adapters", "list", *at, env=env)
    assert "mine" in run("adapters", "list", "--tenant", "acme", *at, env=env)
    assert "scope manage" in failure("adapters", "delete", "mine", *at, "--api-key", uploader)
    run("adapters", "share", "mine", "--tenant", "acme", *at, env=env)
    assert "mine" in run("adapters", "list", *at, env=env)
    assert "source" in run("adapters", "show", "mine", *at, env=env)
    run("adapters", "share", "mine", "--off", "--tenant", "acme", *at, env=env)
    run("keys", "revoke", uploader.split("-")[1], *at, env=env)
    assert "not valid" in failure("adapters", "list", *at, "--api-key", uploader)
    assert len(json.loads(run("keys", "list", "--json", *at, env=env))["data"]) == 2


def test_lists_are_read_page_by_page(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.remote._PAGE", 2)
    at = ("--server", address)
    admin = run("keys", "create", "--scope", "admin", *at).strip()
    for _ in range(4):
        run("keys", "create", *at, "--api-key", admin)
    listed = json.loads(run("keys", "list", "--json", *at, "--api-key", admin))["data"]
    assert len({key["id"] for key in listed}) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("create", "--expires", "soon"), "--expires: 'soon' is no time"),
        (("create", "--expires", "0d"), "--expires"),
        (("create", "--scope", "root"), "'root' is none of"),
        (("create", "--scope", "admin", "--tenant", "acme"), "for keys of the tenant `default` alone"),
        (("revoke", "chorus-0123456789ab-secret"), "that is the key itself"),
        (("revoke", "../adapters/a"), "is no id of a key"),
        (("revoke", "0123456789ab"), "no key of this id"),
    ],
)
def test_what_is_refused_is_one_line(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    at = ("--data-dir", str(tmp_path / "data"))
    run("keys", "create", "--scope", "admin", *at)
    assert message in failure("keys", *words, *at)
