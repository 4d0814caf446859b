"""Usage in the database: a `UsageStore`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from server.registry.database import Database
from server.registry.schema import USAGE
from server.usage.records import DAY_S, GROUPINGS, Amount, UsageLine, UsageQuery, UsageRow

_GROUPS: dict[str, sa.ColumnElement[int] | sa.Column[str]] = {
    "day": (USAGE.c.hour - USAGE.c.hour % DAY_S).label("day"),
    **{name: USAGE.c[name] for name in GROUPINGS if name != "day"},
}


class UsageTable:
    """Raises InsufficientStorage on a full disk."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def save(self, rows: Sequence[UsageRow]) -> None:
        """Idempotent: what was saved of the same hour, journal and key is replaced."""
        if not rows:
            return
        insert = sqlite.insert(USAGE)
        statement = insert.on_conflict_do_update(
            index_elements=list(USAGE.primary_key),
            set_={name: insert.excluded[name] for name in Amount._fields},
        )
        values = [
            {"hour": row.hour, "journal": row.journal, **row.key._asdict(), **row.amount._asdict()}
            for row in rows
        ]
        with self._database.write() as connection:
            connection.execute(statement, values)

    def forget(self, before: int) -> None:
        """Drop the hours before `before`, seconds since 1970."""
        with self._database.write() as connection:
            connection.execute(sa.delete(USAGE).where(USAGE.c.hour < before))

    def lines(self, query: UsageQuery) -> list[UsageLine]:
        """Sorted by their groups."""
        names = [name for name in GROUPINGS if name in query.group_by]
        groups = [_GROUPS[name] for name in names]
        sums = [sa.func.sum(USAGE.c[name]) for name in Amount._fields]
        statement = sa.select(*groups, *sums).where(*_wanted(query)).group_by(*groups).order_by(*groups)
        if query.after is not None and groups:
            statement = statement.having(sa.tuple_(*groups) > sa.tuple_(*query.after))
        with self._database.read() as connection:
            rows = connection.execute(statement.limit(query.most)).all()
        lines = [_line(tuple(row), len(groups)) for row in rows]
        return [line for line in lines if line.amount.requests is not None]  # the sum of no rows


def _line(row: tuple[Any, ...], groups: int) -> UsageLine:
    return UsageLine(row[:groups], Amount(*row[groups:]))


def _wanted(query: UsageQuery) -> list[sa.ColumnElement[bool]]:
    wanted = [USAGE.c.hour >= query.start, USAGE.c.hour < query.end]
    if query.tenant is not None:
        wanted.append(USAGE.c.tenant == query.tenant)
    if query.key is not None:
        wanted.append(USAGE.c.key == query.key)
    if query.adapters:
        wanted.append(USAGE.c.adapter.in_(query.adapters))
    return wanted
