"""What is kept of requests beside their answers: audit records, log lines with their trace, spans."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from server.base_model import StartError
from server.log import JsonFormatter
from tests.api.face_site import open_site
from tests.registry import adapter_files

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(record: dict[str, Any], *names: str) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in names)


async def test_every_change_of_an_adapter_is_audited_and_so_is_what_was_refused(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    files = [("files", each) for each in adapter_files.files(seed=7).items()]
    async with open_site(tmp_path, audit_log=path) as site:
        call = site.client
        await call.put("/v1/adapters/new", files=files, headers={"x-request-id": "mine"})
        await call.put("/v1/adapters/new", files=files)
        await call.post("/v1/adapters", json={"name": "new", "source": "file:/nowhere"})
        await call.post("/v1/adapters", data={"name": "other"}, files=files)
        await call.post("/v1/adapters/new/load", json={"pin": True})
        await call.post("/v1/adapters/new/unload")
        await call.delete("/v1/adapters/new")
        await call.delete("/v1/adapters/new")
        await call.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/etc"})
        await call.post("/v1/unload_lora_adapter", json={"lora_name": "other"})
        for quiet in ("/v1/adapters", "/v1/models", "/v1/adapters/sql", "/metrics"):
            await call.get(quiet)
        await site.complete(model="sql")
    kept = [record for record in records(path) if "status" in record]  # not of the start
    assert [told(record, "event", "name", "outcome", "status", "error") for record in kept] == [
        ("adapter.replace", "new", "completed", 201, None),
        ("adapter.replace", "new", "completed", 200, None),
        ("adapter.create", "new", "rejected", 409, "conflict"),
        ("adapter.create", "other", "completed", 201, None),
        ("adapter.load", "new", "completed", 200, None),
        ("adapter.unload", "new", "completed", 200, None),
        ("adapter.delete", "new", "completed", 200, None),
        ("adapter.delete", "new", "rejected", 404, "model_not_found"),
        ("adapter.create", "x", "rejected", 403, "forbidden"),
        ("adapter.delete", "other", "completed", 200, None),
    ]
    assert told(kept[0], "request_id", "version", "change", "source") == ("mine", 1, "created", "upload")
    assert kept[1]["change"] == "unchanged"
    assert kept[4]["pin"] is True
    assert all(len(record["request_id"]) > 3 for record in kept)


async def test_what_the_adapters_folder_changes_at_a_start_is_audited(tmp_path: Path) -> None:
    """What was there before is not told again; what is refused is, at each start."""
    path = tmp_path / "audit.jsonl"
    adapter_files.write(tmp_path / "adapters" / "gone", adapter_files.files(seed=8))
    (tmp_path / "adapters" / "bad").mkdir()
    (tmp_path / "adapters" / "bad" / "adapter_config.json").write_text("{}")
    async with open_site(tmp_path, audit_log=path):
        first = records(path)
    shutil.rmtree(tmp_path / "adapters" / "gone")
    async with open_site(tmp_path, audit_log=path):
        second = records(path)[len(first) :]
    assert [told(record, "event", "name", "outcome", "version", "change") for record in first] == [
        ("adapter.create", "bad", "rejected", None, None),
        ("adapter.create", "gone", "completed", 1, "created"),
        ("adapter.create", "sql", "completed", 1, "created"),
        ("adapter.create", "team/json", "completed", 1, "created"),
    ]
    assert "safetensors" in first[0]["reason"]
    assert first[1]["source"] == "folder:gone"
    assert [told(record, "event", "name", "outcome") for record in second] == [
        ("adapter.create", "bad", "rejected"),
        ("adapter.delete", "gone", "completed"),
    ]


async def test_an_audit_file_that_cannot_be_opened_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"--audit-log .*: No such file"):
        async with open_site(tmp_path, audit_log=tmp_path / "none" / "file"):
            pass


@pytest.mark.parametrize(
    ("traceparent", "seen"),
    [
        (f"00-{TRACE}-00f067aa0ba902b7-01", TRACE),
        (f"cc-{TRACE}-00f067aa0ba902b7-01-later", TRACE),
        (f"00-{TRACE.upper()}-00f067aa0ba902b7-01", None),
        (f"ff-{TRACE}-00f067aa0ba902b7-01", None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        ("x\n" * 100, None),
        ("", None),
    ],
)
async def test_log_lines_carry_the_callers_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, traceparent: str, seen: str | None
) -> None:
    caplog.set_level(logging.INFO, "server.access")
    caplog.handler.setFormatter(JsonFormatter())
    async with open_site(tmp_path) as site:
        caplog.clear()
        await site.client.get("/v1/models", headers={"traceparent": traceparent.replace("\n", " ")})
    lines = [json.loads(line) for line in caplog.text.splitlines()]
    (line,) = [line for line in lines if line["logger"] == "server.access"]
    assert line.get("trace_id") == seen
    assert told(line, "method", "path", "status", "outcome") == ("GET", "/v1/models", 200, "completed")
    assert line["request_id"]
