"""What happens between the start of the app and its first request."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

import pytest

from server.registry.store import ContentStore, DataDirInUseError
from tests.api.face_site import open_site
from tests.api.fake_engine import FakeEngine


async def test_a_data_folder_in_use_is_known_before_the_engine_starts(tmp_path: Path) -> None:
    engine = FakeEngine()
    with closing(ContentStore(tmp_path / "data")):
        async with open_site(tmp_path, engine) as site:
            (reason,) = site.failures
    assert "lock is locked by another server" in reason
    assert engine.starts == 0


async def test_a_data_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("in the way")
    engine = FakeEngine()
    async with open_site(tmp_path, engine) as site:
        assert len(site.failures) == 1
    assert engine.starts == 0


async def test_the_data_folder_is_ours_while_the_engine_loads_and_free_when_it_cannot(tmp_path: Path) -> None:
    class Engine(FakeEngine):
        async def wait_ready(self) -> None:
            with pytest.raises(DataDirInUseError):
                ContentStore(tmp_path / "data")
            await super().wait_ready()

    engine = Engine()
    engine.failure = "no memory"
    async with open_site(tmp_path, engine) as site:
        assert site.failures == ["no memory"]
        ContentStore(tmp_path / "data").close()
    assert engine.starts == 1


async def test_the_data_folder_is_free_after_a_stop_during_the_load(tmp_path: Path) -> None:
    class Engine(FakeEngine):
        async def wait_ready(self) -> None:
            await asyncio.Event().wait()

    async with open_site(tmp_path, Engine(), wait=False):
        await asyncio.sleep(0)
    ContentStore(tmp_path / "data").close()
