"""What survives a restart of the adapters: names, their versions and how much each was used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import sqlalchemy as sa

from server.access.caller import DEFAULT_TENANT
from server.registry.database import Database
from server.registry.schema import ADAPTERS, FACTS, VERSIONS


class AdapterId(NamedTuple):
    """Names live in a tenant: two of them may use the same."""

    tenant: str
    name: str


@dataclass(frozen=True)
class AdapterRow:
    """A name. `folder_stamp` says which state of a folder it was read from, if it came from one; `shared`
    that every tenant may use it."""

    name: str
    current: int
    folder_stamp: str | None
    description: str
    pinned: bool
    created_at: float
    tenant: str = DEFAULT_TENANT
    shared: bool = False

    @property
    def id(self) -> AdapterId:
        return AdapterId(self.tenant, self.name)


@dataclass(frozen=True)
class VersionRow:
    """A version of a name. `bytes` are of its weights; `requests` and `tokens` were served so far."""

    name: str
    number: int
    digest: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    parameters: int
    bytes: int
    source: str
    created_at: float
    requests: int = 0
    tokens: int = 0
    last_used: float | None = None
    tenant: str = DEFAULT_TENANT
    content: str = ""  # the digest of its files alone; see `identity`


class Catalogue:
    """The adapters and versions in the database. Raises InsufficientStorage on a full disk."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def load(self) -> list[tuple[AdapterRow, list[VersionRow]]]:
        """Every adapter with its versions, oldest first."""
        with self._database.read() as connection:
            adapters = [AdapterRow(*row) for row in connection.execute(_ADAPTERS)]
            versions = [_version(row) for row in connection.execute(_VERSIONS)]
        of_id: dict[AdapterId, list[VersionRow]] = {}
        for version in versions:
            of_id.setdefault(AdapterId(version.tenant, version.name), []).append(version)
        return [(adapter, of_id[adapter.id]) for adapter in adapters]

    def publish(self, adapter: AdapterRow, version: VersionRow, retired: Sequence[int]) -> None:
        """In one transaction: the adapter's row as given, its new version, without the retired ones."""
        columns = vars(adapter)
        with self._database.write() as connection:
            changes = {key: columns[key] for key in ("current", "folder_stamp", "description")}
            known = sa.update(ADAPTERS).where(_is(ADAPTERS, adapter.id)).values(changes)
            if connection.execute(known).rowcount == 0:
                connection.execute(sa.insert(ADAPTERS).values(columns))
            connection.execute(sa.insert(VERSIONS).values(vars(version) | {"targets": list(version.targets)}))
            connection.execute(
                sa.delete(VERSIONS).where(_is(VERSIONS, adapter.id), VERSIONS.c.number.in_(retired))
            )

    def update(self, adapter: AdapterId, **fields: Any) -> None:
        """Change columns of an adapter's row."""
        with self._database.write() as connection:
            connection.execute(sa.update(ADAPTERS).where(_is(ADAPTERS, adapter)).values(fields))

    def delete(self, adapter: AdapterId) -> None:
        """On a full disk too, because to delete is how room is made."""
        self._database.execute_on_reserve(sa.delete(ADAPTERS).where(_is(ADAPTERS, adapter)))

    def count(self, used: Sequence[VersionRow]) -> None:
        """Write the counters of these versions."""
        where = sa.and_(
            VERSIONS.c.tenant == sa.bindparam("of_tenant"),
            VERSIONS.c.name == sa.bindparam("of_name"),
            VERSIONS.c.number == sa.bindparam("of_number"),
            VERSIONS.c.digest == sa.bindparam("of_digest"),
        )
        rows = [
            {
                "of_tenant": row.tenant,
                "of_name": row.name,
                "of_number": row.number,
                "of_digest": row.digest,
                "requests": row.requests,
                "tokens": row.tokens,
                "last_used": row.last_used,
            }
            for row in used
        ]
        if rows:
            with self._database.write() as connection:
                connection.execute(sa.update(VERSIONS).where(where), rows)

    def fact(self, key: str) -> str | None:
        with self._database.read() as connection:
            return connection.execute(sa.select(FACTS.c.value).where(FACTS.c.key == key)).scalar()

    def set_fact(self, key: str, value: str) -> None:
        with self._database.write() as connection:
            connection.execute(sa.delete(FACTS).where(FACTS.c.key == key))
            connection.execute(sa.insert(FACTS).values(key=key, value=value))


# Columns in the order of the fields, so that no names are looked up for each of many thousands of rows.
_ADAPTERS = sa.select(*(ADAPTERS.c[each.name] for each in fields(AdapterRow))).order_by(ADAPTERS.c.name)
_VERSIONS = sa.select(*(VERSIONS.c[each.name] for each in fields(VersionRow))).order_by(VERSIONS.c.number)
_TARGETS = [each.name for each in fields(VersionRow)].index("targets")


def _version(row: sa.Row[Any]) -> VersionRow:
    values = list(row)
    values[_TARGETS] = tuple(values[_TARGETS])
    return VersionRow(*values)


def _is(table: sa.Table, adapter: AdapterId) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.tenant == adapter.tenant, table.c.name == adapter.name)
