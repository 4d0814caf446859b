"""Quotas in the database: a `QuotaStore`."""

from __future__ import annotations

import dataclasses

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from server.registry.database import Database
from server.registry.schema import QUOTAS
from server.usage.quotas import Quota, Subject


class QuotaTable:
    """Raises InsufficientStorage on a full disk."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def load(self) -> dict[Subject, Quota]:
        with self._database.read() as connection:
            rows = connection.execute(sa.select(QUOTAS)).all()
        return {Subject(kind, name): Quota(**limits) for kind, name, limits in rows}

    def put(self, subject: Subject, quota: Quota) -> None:
        given = {name: value for name, value in dataclasses.asdict(quota).items() if value is not None}
        insert = sqlite.insert(QUOTAS).values(kind=subject.kind, id=subject.id, limits=given)
        with self._database.write() as connection:
            connection.execute(
                insert.on_conflict_do_update(
                    index_elements=list(QUOTAS.primary_key), set_={"limits": insert.excluded.limits}
                )
            )

    def remove(self, subject: Subject) -> None:
        """On a full disk too, with the room kept for deleting."""
        of_it = sa.and_(QUOTAS.c.kind == subject.kind, QUOTAS.c.id == subject.id)
        self._database.execute_on_reserve(sa.delete(QUOTAS).where(of_it))
