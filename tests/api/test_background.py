"""Work that outlives its request, and the end of it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from server.api.background import Background
from tests.api.face_site import open_site


async def test_close_waits_for_the_end_of_what_it_cancels() -> None:
    ended: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("endless")

    async def short() -> None:
        ended.append("short")

    background = Background()
    begun, quick = background.start(endless()), background.start(short())
    await quick
    await background.close()
    assert begun.cancelled()
    assert ended == ["short", "endless"]
    await background.close()


async def test_what_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise ValueError("broken")

    task = Background().start(fails())
    await asyncio.wait([task])
    await asyncio.sleep(0)
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "broken" in str(record.exc_info)


async def test_the_server_ends_without_work_left_over(tmp_path: Path) -> None:
    """A delete waits for the last user of the adapter, who may outlive the server's patience."""
    before = asyncio.all_tasks()
    async with open_site(tmp_path) as site:
        lease = site.face.require_registry().acquire("sql")
        answer = await site.client.post("/v1/unload_lora_adapter", json={"lora_name": "sql"})
        assert answer.status_code == 200
        assert asyncio.all_tasks() > before  # it waits
    assert asyncio.all_tasks() == before
    lease.release()
