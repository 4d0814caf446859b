"""What survives a restart, in one SQLite file: the adapters, their versions and how much each was used."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from server.errors import InsufficientStorage
from server.registry.store import create_private

SCHEMA_VERSION = 1

_RESERVE_BYTES = 256 * 2**10

_METADATA = sa.MetaData()
_ADAPTERS = sa.Table(
    "adapters",
    _METADATA,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("current", sa.Integer, nullable=False),
    sa.Column("folder_stamp", sa.String),
    sa.Column("description", sa.String, nullable=False),
    sa.Column("pinned", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)
_VERSIONS = sa.Table(
    "versions",
    _METADATA,
    sa.Column("name", sa.ForeignKey("adapters.name", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String, nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("alpha", sa.Float, nullable=False),
    sa.Column("targets", sa.JSON, nullable=False),
    sa.Column("parameters", sa.Integer, nullable=False),
    sa.Column("bytes", sa.Integer, nullable=False),
    sa.Column("source", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("requests", sa.Integer, nullable=False),
    sa.Column("tokens", sa.Integer, nullable=False),
    sa.Column("last_used", sa.Float),
)
_FACTS = sa.Table(
    "facts",
    _METADATA,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("value", sa.String, nullable=False),
)


@dataclass(frozen=True)
class AdapterRow:
    """A name. `folder_stamp` says which state of a folder it was read from, if it came from one."""

    name: str
    current: int
    folder_stamp: str | None
    description: str
    pinned: bool
    created_at: float


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


class Catalogue:
    """One connection pool, one writer at a time. A commit that returned survives a power failure.

    Raises InsufficientStorage on a full disk, RuntimeError for a file of a newer server.
    """

    def __init__(self, path: Path) -> None:
        self._engine = sa.create_engine(f"sqlite:///{path}")
        self._writer = threading.Lock()
        self._reserve = path.with_name("registry.reserve")
        sa.event.listen(self._engine, "connect", _configure)
        for file in (path, self._reserve):  # SQLite's other files get the mode of the first
            with suppress(OSError):
                os.close(create_private(file))
        try:
            self._migrate(path)
            self._keep_reserve()
        except BaseException:
            self._engine.dispose()
            raise

    def close(self) -> None:
        self._engine.dispose()

    def load(self) -> list[tuple[AdapterRow, list[VersionRow]]]:
        """Every adapter with its versions, oldest first."""
        with self._engine.connect() as connection:
            adapters = connection.execute(sa.select(_ADAPTERS).order_by(_ADAPTERS.c.name)).mappings().all()
            versions = connection.execute(sa.select(_VERSIONS).order_by(_VERSIONS.c.number)).mappings().all()
        of_name: dict[str, list[VersionRow]] = {row["name"]: [] for row in adapters}
        for row in versions:
            fields = dict(row) | {"targets": tuple(row["targets"])}
            of_name[row["name"]].append(VersionRow(**fields))
        return [(AdapterRow(**row), of_name[row["name"]]) for row in adapters]

    def publish(self, adapter: AdapterRow, version: VersionRow, retired: Sequence[int]) -> None:
        """In one transaction: the adapter's row as given, its new version, without the retired ones."""
        fields = vars(adapter)
        with self._write() as connection:
            changes = {key: fields[key] for key in ("current", "folder_stamp", "description")}
            known = sa.update(_ADAPTERS).where(_ADAPTERS.c.name == adapter.name).values(changes)
            if connection.execute(known).rowcount == 0:
                connection.execute(sa.insert(_ADAPTERS).values(fields))
            connection.execute(
                sa.insert(_VERSIONS).values(vars(version) | {"targets": list(version.targets)})
            )
            connection.execute(
                sa.delete(_VERSIONS).where(_VERSIONS.c.name == adapter.name, _VERSIONS.c.number.in_(retired))
            )

    def update(self, name: str, **fields: Any) -> None:
        """Change columns of an adapter's row."""
        with self._write() as connection:
            connection.execute(sa.update(_ADAPTERS).where(_ADAPTERS.c.name == name).values(fields))

    def delete(self, name: str) -> None:
        """On a full disk too: the room kept for it is given up, because to delete is how room is made."""
        statement = sa.delete(_ADAPTERS).where(_ADAPTERS.c.name == name)
        try:
            with self._write() as connection:
                connection.execute(statement)
        except InsufficientStorage:
            self._reserve.unlink(missing_ok=True)
            with self._write() as connection:
                connection.execute(statement)
        self._keep_reserve()

    def count(self, used: Sequence[VersionRow]) -> None:
        """Write the counters of these versions."""
        where = sa.and_(
            _VERSIONS.c.name == sa.bindparam("of_name"),
            _VERSIONS.c.number == sa.bindparam("of_number"),
            _VERSIONS.c.digest == sa.bindparam("of_digest"),
        )
        rows = [
            {
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
            with self._write() as connection:
                connection.execute(sa.update(_VERSIONS).where(where), rows)

    def fact(self, key: str) -> str | None:
        with self._engine.connect() as connection:
            return connection.execute(sa.select(_FACTS.c.value).where(_FACTS.c.key == key)).scalar()

    def set_fact(self, key: str, value: str) -> None:
        with self._write() as connection:
            connection.execute(sa.delete(_FACTS).where(_FACTS.c.key == key))
            connection.execute(sa.insert(_FACTS).values(key=key, value=value))

    def _migrate(self, path: Path) -> None:
        with self._engine.connect() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if version > SCHEMA_VERSION:
            raise RuntimeError(
                f"{path} was written by a newer Chorus (schema {version}, this one knows {SCHEMA_VERSION})."
            )
        if version < SCHEMA_VERSION:
            with self._write() as connection:
                _METADATA.create_all(connection)
                connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _keep_reserve(self) -> None:
        with suppress(OSError), self._reserve.open("ab") as file:
            file.write(bytes(max(0, _RESERVE_BYTES - file.tell())))

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        try:
            with self._writer, self._engine.begin() as connection:
                yield connection
        except sa.exc.OperationalError as error:
            if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise InsufficientStorage("The server's disk is full; nothing was stored.") from error
            raise


def _configure(connection: sqlite3.Connection, _record: object) -> None:
    """Write-ahead log, so that readers never wait; FULL, so that a commit is on disk when it returns."""
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "busy_timeout = 10000"):
        connection.execute(f"PRAGMA {pragma}")
