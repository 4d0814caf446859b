"""The SQLite file of a data folder: looked at before it is used, written by one at a time."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import sqlalchemy as sa

from server.errors import ChorusError, InsufficientStorage
from server.registry.schema import SCHEMA_VERSION, TABLES, upgrade
from server.registry.store import DataFolderError, create_private

_MAGIC = b"SQLite format 3\0"
_RESERVE_BYTES = 256 * 2**10
_RESTORE = "put it back from a backup, or choose another --data-dir; nothing was changed or deleted"


class DamagedRegistryError(DataFolderError):
    """`registry.db` is not what this server left there. Nothing was written or deleted."""


class Database:
    """One connection pool, one writer at a time. A commit that returned survives a power failure.

    `new_is_wrong` says what else lies in the folder where a file that is not there, or empty, is a loss and
    no beginning. Raises DamagedRegistryError, DataFolderError for a file of a newer server or one that cannot
    be used now.
    """

    def __init__(self, path: Path, *, new_is_wrong: str | None = None) -> None:
        version = _inspect(path)
        if version == 0 and new_is_wrong is not None:
            raise DamagedRegistryError(f"{path} is missing or empty, but {new_is_wrong}: {_RESTORE}.")
        self._engine = sa.create_engine(f"sqlite:///{path}")
        self._writer = threading.Lock()
        self._closed = False
        self._reserve = path.with_name("registry.reserve")
        with suppress(OSError):  # `_open` will say it
            os.close(create_private(path))  # SQLite's other files get its mode
        sa.event.listen(self._engine, "connect", _configure)
        sa.event.listen(self._engine, "begin", _begin)
        try:
            self._open(path, version)
            self._keep_reserve()
        except BaseException:
            self._engine.dispose()
            raise

    def close(self) -> None:
        """Idempotent. From here on the folder may be another server's: what would write fails."""
        self._closed = True
        self._engine.dispose()

    def read(self) -> sa.Connection:
        """For a `with`."""
        return self._engine.connect()

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction. Raises InsufficientStorage on a full disk."""
        try:
            with self._writer, self._engine.begin() as connection:
                if self._closed:
                    raise RuntimeError("the data folder is closed")
                yield connection
        except sa.exc.OperationalError as error:
            if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise InsufficientStorage("The server's disk is full; nothing was stored.") from error
            raise

    def execute_on_reserve(self, statement: sa.Executable) -> None:
        """One transaction that works on a full disk too: the room kept for it is given up then."""
        try:
            with self.write() as connection:
                connection.execute(statement)
        except InsufficientStorage:
            self._reserve.unlink(missing_ok=True)
            with self.write() as connection:
                connection.execute(statement)
        self._keep_reserve()

    def _keep_reserve(self) -> None:
        with suppress(OSError), os.fdopen(create_private(self._reserve), "ab") as file:
            file.write(bytes(max(0, _RESERVE_BYTES - file.tell())))

    def _open(self, path: Path, version: int) -> None:
        """To the present schema. Writes in any case, so that a file that cannot be written is known now."""
        try:
            with self.write() as connection:
                if version < SCHEMA_VERSION:
                    upgrade(connection, version)
                else:
                    connection.exec_driver_sql(f"PRAGMA user_version = {version}")
        except (sa.exc.DBAPIError, sqlite3.Error) as error:
            raise _unusable(path, getattr(error, "orig", error)) from error
        except ChorusError as error:
            raise DataFolderError(f"{path} cannot be written: {error.message}") from error


def _inspect(path: Path) -> int:
    """The schema's version, 0 where there is no file yet, or an empty one. Opens read-only: SQLite would
    write a journal that was left behind into whatever file it finds beside it."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except FileNotFoundError:
        journal = path.with_name(path.name + "-wal")
        if journal.exists() and journal.stat().st_size:
            raise DamagedRegistryError(
                f"{path} is missing, but its {journal.name} is there: {_RESTORE}."
            ) from None
        return 0
    except OSError as error:
        raise DataFolderError(f"{path} cannot be read: {error.strerror}.") from error
    if not magic:
        return 0
    if not os.access(path, os.W_OK, effective_ids=True):  # SQLite would read it, and leave files that block
        raise _unusable(path, PermissionError("it is read-only"))
    if magic != _MAGIC:
        raise DamagedRegistryError(f"{path} is damaged or no registry of Chorus: {_RESTORE}.")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            return _judge(path, connection)
    except sqlite3.Error as error:
        raise _unusable(path, error) from error


def _judge(path: Path, connection: sqlite3.Connection) -> int:
    """The schema's version of a file that is sound. Raises DamagedRegistryError, DataFolderError."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise DataFolderError(
            f"{path} was written by a newer Chorus (schema {version}, this one knows {SCHEMA_VERSION}): "
            "start that version, or choose another --data-dir."
        )
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise DamagedRegistryError(f"{path} is damaged ({found.splitlines()[-1]}): {_RESTORE}.")
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    expected = TABLES.get(version, set[str]())
    if (version == 0 and tables) or not expected <= tables:
        raise DamagedRegistryError(f"{path} is no registry of Chorus: {_RESTORE}.")
    return int(version)


def _unusable(path: Path, error: BaseException | None) -> DataFolderError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest says more of the same
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return DamagedRegistryError(f"{path} is damaged ({error}): {_RESTORE}.")
    return DataFolderError(
        f"{path} cannot be used ({error}): this server must be able to read and write it and its folder."
    )


def _configure(connection: sqlite3.Connection, _record: object) -> None:
    """Write-ahead log, so that readers never wait; FULL, so that a commit is on disk when it returns."""
    connection.isolation_level = None  # transactions begin where `_begin` says: the driver leaves DDL out
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "busy_timeout = 10000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN")
