"""The SQLite file on a disk that is full."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from server.errors import InsufficientStorage
from server.registry.catalogue import AdapterId, AdapterRow, Catalogue, VersionRow
from server.registry.database import Database

A = AdapterId("default", "a")
ADAPTER = AdapterRow("a", 1, None, "", False, 0.0)
VERSION = VersionRow("a", 1, "d1", 4, 8.0, ("q_proj",), 10, 40, "upload", 0.0)


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    database = Database(tmp_path / "registry.db")
    yield Catalogue(database)
    database.close()


def fill(catalogue: Catalogue, written: list[str]) -> None:
    for i in range(1000):
        name = f"n{i:04}"
        row = replace(ADAPTER, name=name, description="x" * 1000)
        catalogue.publish(row, replace(VERSION, name=name), [])
        written.append(name)


def test_a_full_file_is_told_and_keeps_what_it_has(tmp_path: Path) -> None:
    def limit(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA max_page_count = 20")

    sa.event.listen(sa.Engine, "connect", limit)
    try:
        database = Database(tmp_path / "registry.db")
        catalogue = Catalogue(database)
        written: list[str] = []
        with pytest.raises(InsufficientStorage):
            fill(catalogue, written)
        assert written
        assert [row.name for row, _ in catalogue.load()] == written
        database.close()
    finally:
        sa.event.remove(sa.Engine, "connect", limit)


def test_a_full_disk_does_not_stop_a_delete(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue.publish(ADAPTER, VERSION, [])
    reserve = tmp_path / "registry.reserve"
    begin = sa.Engine.begin

    def begin_where_there_is_room(engine: sa.Engine) -> object:
        if reserve.exists():
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise sa.exc.OperationalError("", {}, error)
        return begin(engine)

    assert reserve.stat().st_size > 0
    monkeypatch.setattr(sa.Engine, "begin", begin_where_there_is_room)
    with pytest.raises(InsufficientStorage):
        catalogue.update(A, description="new")
    catalogue.delete(A)
    assert catalogue.load() == []
    assert reserve.stat().st_size > 0  # for the next time


def test_publishing_again_keeps_the_pin_and_drops_the_retired(catalogue: Catalogue) -> None:
    catalogue.publish(ADAPTER, VERSION, [])
    catalogue.update(A, pinned=True)
    second = replace(VERSION, number=2, digest="d2")
    catalogue.publish(replace(ADAPTER, current=2, description="new"), second, [1])
    assert catalogue.load() == [(replace(ADAPTER, current=2, description="new", pinned=True), [second])]


def test_counters_belong_to_the_content_they_were_made_for(catalogue: Catalogue) -> None:
    catalogue.publish(ADAPTER, VERSION, [])
    used = replace(VERSION, requests=3, tokens=50, last_used=9.0)
    catalogue.count([used, replace(used, digest="other", requests=7)])
    ((_, (version,)),) = catalogue.load()
    assert version == used
