"""`POST /v1/admin/reload`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.api.face_site import Site, open_site

KEPT = "max_request_bytes = 100_000\n"


def write(file: Path, text: str) -> None:
    file.write_text(text)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "chorus.toml"
    path.write_text(KEPT)
    return path


@pytest.fixture
async def configured(tmp_path: Path, file: Path) -> AsyncIterator[Site]:
    level = logging.getLogger().level
    async with open_site(tmp_path / "site", config=file) as site:
        yield site
    logging.getLogger().setLevel(level)


async def test_what_has_changed_is_taken_over_and_told(configured: Site, file: Path) -> None:
    assert (await configured.complete(prompt="x" * 1000)).status_code != 413
    write(file, 'max_request_bytes = 500\nwatchdog_s = 9\nlog_level = "error"\nmax_num_seqs = 7\n')
    answer = await configured.client.post("/v1/admin/reload")
    assert answer.json() == {
        "changed": {"max_request_bytes": 500, "watchdog_s": 9.0, "log_level": "error"},
        "needs_restart": ["max_num_seqs"],
        "certificate": False,
    }
    assert (await configured.complete(prompt="x" * 1000)).status_code == 413
    assert logging.getLogger().level == logging.ERROR
    assert configured.engine.configured[-1].watchdog_s == 9
    assert configured.face.settings.max_num_seqs == 64


async def test_what_is_asked_of_each_request_changes_with_the_next(configured: Site, file: Path) -> None:
    write(file, KEPT + "request_timeout_s = 0.05\nmax_unread_bytes = 9\nupload_timeout_s = 7\n")
    answer = await configured.client.post("/v1/admin/reload")
    assert answer.json()["changed"] == {
        "request_timeout_s": 0.05, "max_unread_bytes": 9, "upload_timeout_s": 7.0
    }  # fmt: skip
    await configured.complete()
    assert configured.engine.requests[-1].timeout_s == 0.05


async def test_the_waiting_room_grows_and_shrinks_around_those_who_wait(configured: Site, file: Path) -> None:
    room = configured.face.waiting_room

    async def limited_to(sequences: int) -> float:
        write(file, KEPT + f"max_waiting_requests = {sequences}\n")
        answer = await configured.client.post("/v1/admin/reload")
        assert answer.json()["changed"] == {"max_waiting_requests": sequences}
        metrics = (await configured.client.get("/metrics")).text
        return float(metrics.partition("\nchorus_queue_limit ")[2].partition("\n")[0])

    with room.enter("", 3):
        assert await limited_to(2) == 2
        assert room.waiting == 3
        refused = await configured.complete()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_full")
        assert await limited_to(4) == 4
        assert (await configured.complete()).status_code == 200


@pytest.mark.parametrize(
    ("text", "param"), [("watchdog_s = -1", "watchdog_s"), ("no_such = 1", "no_such"), ("=", "config")]
)
async def test_a_wrong_file_changes_nothing(configured: Site, file: Path, text: str, param: str) -> None:
    write(file, KEPT.replace("100", "200") + text)
    answer = await configured.client.post("/v1/admin/reload")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert str(file) not in answer.text
    assert configured.face.settings.max_request_bytes == 100_000


async def test_there_may_be_no_file(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        answer = await site.client.post("/v1/admin/reload")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
