"""The audit file: private, appended to, and followed when it is moved."""

from __future__ import annotations

import json
import logging
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from server.telemetry.audit import AuditLog, audit


def asked(event: str, **facts: object) -> dict[str, Any]:
    """The state of a request that asked for a change."""
    scope: dict[str, Any] = {"type": "http", "state": {"request_id": "r1", "tenant": "acme", "key_id": "k1"}}
    audit(event, Request(scope), **facts)
    state: dict[str, Any] = scope["state"]
    return state


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_who_what_when_and_what_came_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.audit")
    path = tmp_path / "audit.jsonl"
    with closing(AuditLog(path)) as log:
        state = asked("adapter.delete", name="sql\n\x1b[1m") | {"error_code": "model_not_found"}
        log.write(state, "10.0.0.9", 404, "rejected")
        log.write({"request_id": "r2"}, None, 200, "completed")  # asked for no change
    (record,) = written(path)
    assert record.pop("time").endswith("Z")
    assert record == {
        "event": "adapter.delete", "name": "sql\n\x1b[1m", "outcome": "rejected", "status": 404,
        "error": "model_not_found", "client": "10.0.0.9", "request_id": "r1", "tenant": "acme",
        "key_id": "k1",
    }  # fmt: skip
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == r"adapter.delete sql\n\x1b[1m rejected"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_later_facts_add_to_earlier_ones_and_long_ones_are_cut() -> None:
    state = asked("adapter.create", name="x" * 10_000)
    scope: dict[str, Any] = {"type": "http", "state": state}
    audit("adapter.create", Request(scope), version=3)
    assert state["audit"] == {"event": "adapter.create", "name": "x" * 255, "version": 3}


def test_it_appends_and_follows_a_rotation(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"event": "before"}\n')
    with closing(AuditLog(path)) as log:
        log.write(asked("one"), None, 200, "completed")
        path.rename(tmp_path / "audit.1")
        log.write(asked("two"), None, 200, "completed")
    assert [record["event"] for record in written(tmp_path / "audit.1")] == ["before", "one"]
    assert [record["event"] for record in written(path)] == ["two"]


def test_a_file_that_cannot_be_written_costs_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    with closing(AuditLog(folder / "audit.jsonl")) as log:
        (folder / "audit.jsonl").unlink()
        folder.rmdir()
        log.write(asked("one", name="sql"), None, 200, "completed")
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert '"name": "sql"' in error.getMessage()  # the record is not lost


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for path in (tmp_path / "no" / "folder", tmp_path, tmp_path / "link"):
        with pytest.raises(OSError, match=r"\[Errno"):
            AuditLog(path)
    assert not (tmp_path / "elsewhere").exists()
