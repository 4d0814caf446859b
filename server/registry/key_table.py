"""The API keys in the database: a `KeyStore`."""

from __future__ import annotations

import sqlalchemy as sa

from server.access.keys import ApiKey
from server.registry.database import Database
from server.registry.schema import KEYS


class KeyTable:
    """Raises InsufficientStorage on a full disk."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def load(self) -> list[ApiKey]:
        with self._database.read() as connection:
            rows = connection.execute(sa.select(KEYS)).mappings().all()
        return [ApiKey(**dict(row) | {"scopes": tuple(row["scopes"])}) for row in rows]

    def insert(self, key: ApiKey) -> None:
        with self._database.write() as connection:
            connection.execute(sa.insert(KEYS).values(vars(key) | {"scopes": list(key.scopes)}))

    def revoke(self, key_id: str, at: float) -> None:
        """On a full disk too, with the room kept for deleting."""
        statement = sa.update(KEYS).where(KEYS.c.id == key_id).values(revoked_at=at)
        self._database.execute_on_reserve(statement)

    def note_used(self, used: dict[str, float]) -> None:
        """By id, seconds since 1970."""
        statement = sa.update(KEYS).where(KEYS.c.id == sa.bindparam("of_id"))
        rows = [{"of_id": key_id, "last_used": at} for key_id, at in used.items()]
        with self._database.write() as connection:
            connection.execute(statement.values(last_used=sa.bindparam("last_used")), rows)
