"""A registry that is damaged, gone, foreign or old: told in one sentence, nothing deleted or changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from server.registry.catalogue import AdapterId, AdapterRow, Catalogue
from server.registry.data_folder import DataFolder
from server.registry.database import DamagedRegistryError, Database
from server.registry.schema import SCHEMA_VERSION
from server.registry.store import DataFolderError
from server.usage.records import UsageQuery
from tests.registry import adapter_files
from tests.registry.conftest import Publish

Damage = Callable[[Path], None]


def contents(folder: Path) -> dict[str, str]:
    """Every file of a data folder with its hash; not the lock, nor what SQLite makes to read."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.stat().st_size and path.name not in ("lock", "registry.db-shm")
    }


@pytest.fixture
def served(data_dir: Path, publish: Publish) -> Path:
    """A data folder with an adapter in it, after its server has ended."""
    with closing(adapter_files.open_registry(data_dir)) as registry:
        publish(registry, "a")
    return data_dir / "registry.db"


def rewritten(change: Callable[[bytes], bytes]) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return damage


def foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE bookmarks (url)")
        connection.commit()


def stripped(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE versions")
        connection.commit()


def missing_with_journal(path: Path) -> None:
    path.rename(path.with_name("registry.db-wal"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "is missing or empty, but stored adapters are there"),
        (rewritten(lambda _: b""), "is missing or empty, but stored adapters are there"),
        (missing_with_journal, "is missing, but its registry.db-wal is there"),
        (rewritten(lambda data: bytes(len(data))), "is damaged or no registry"),
        (rewritten(lambda data: data[:100]), "is damaged"),
        (rewritten(lambda data: data[:5000]), "is damaged"),
        (rewritten(lambda data: data[:4096] + os.urandom(len(data) - 4096)), "is damaged"),
        (rewritten(lambda _: b"a text about something else\n" * 500), "is damaged or no registry"),
        (foreign, "is no registry of Chorus"),
        (stripped, "is no registry of Chorus"),
    ],
)
def test_what_is_no_registry_any_more(served: Path, damage: Damage, words: str) -> None:
    damage(served)
    before = contents(served.parent)
    for _ in range(2):
        with pytest.raises(DamagedRegistryError) as caught:
            adapter_files.open_registry(served.parent)
        message = str(caught.value)
        assert words in message
        assert str(served) in message
        assert "backup" in message
        assert "\n" not in message
    assert contents(served.parent) == before
    assert any((served.parent / "adapters").glob("*/*"))


def test_a_missing_registry_is_a_beginning_where_nothing_else_is(data_dir: Path) -> None:
    data_dir.mkdir()
    (data_dir / "registry.db").touch()  # killed right at the first start
    adapter_files.open_registry(data_dir).close()
    adapter_files.open_registry(data_dir).close()


def test_a_journal_that_a_kill_left_is_taken_in(served: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    database = Database(served)
    Catalogue(database).update(AdapterId("default", "a"), description="of the journal")
    shutil.copytree(served.parent, copy)  # as a kill leaves it: the journal is not taken in yet
    database.close()
    assert (copy / "registry.db-wal").stat().st_size > 0
    with closing(adapter_files.open_registry(copy)) as registry:
        assert registry.get("a").description == "of the journal"


def test_a_folder_in_the_place_of_a_file(served: Path) -> None:
    served.unlink()
    served.mkdir()
    with pytest.raises(DataFolderError, match=r"registry\.db cannot be read: Is a directory"):
        adapter_files.open_registry(served.parent)


@contextmanager
def another_user() -> Iterator[None]:
    """Without root's rights, which no mode of a file stops."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(("name", "mode"), [("registry.db", 0o444), ("registry.db", 0), ("lock", 0o444)])
def test_files_that_cannot_be_written(served: Path, name: str, mode: int) -> None:
    with tempfile.TemporaryDirectory(prefix="chorus-test-", dir="/tmp") as outer:
        folder = Path(outer) / "data"
        shutil.copytree(served.parent, folder)
        for path in (Path(outer), *Path(outer).rglob("*")):
            path.chmod(0o777)
        (folder / name).chmod(mode)
        with another_user(), pytest.raises(DataFolderError) as caught:
            DataFolder(folder)
        assert str(folder / name) in str(caught.value)
        assert "read" in str(caught.value)
        (folder / name).chmod(0o666)
        with another_user():
            DataFolder(folder).close()


def test_the_lock_is_opened_without_following_links(data_dir: Path, tmp_path: Path) -> None:
    data_dir.mkdir()
    (tmp_path / "precious").write_text("do not truncate")
    (data_dir / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(DataFolderError, match="lock"):
        DataFolder(data_dir)
    assert (tmp_path / "precious").read_text() == "do not truncate"


def test_a_closed_database_is_not_written_any_more(data_dir: Path) -> None:
    """The folder may be another server's by then."""
    folder = DataFolder(data_dir)
    folder.close()
    with pytest.raises(RuntimeError, match="closed"):
        folder.catalogue.set_fact("a", "b")


# migration

SCHEMA_1 = """
CREATE TABLE adapters (name VARCHAR NOT NULL, current INTEGER NOT NULL, folder_stamp VARCHAR,
    description VARCHAR NOT NULL, pinned BOOLEAN NOT NULL, created_at FLOAT NOT NULL, PRIMARY KEY (name));
CREATE TABLE facts ("key" VARCHAR NOT NULL, value VARCHAR NOT NULL, PRIMARY KEY ("key"));
CREATE TABLE versions (name VARCHAR NOT NULL, number INTEGER NOT NULL, digest VARCHAR NOT NULL,
    rank INTEGER NOT NULL, alpha FLOAT NOT NULL, targets JSON NOT NULL, parameters INTEGER NOT NULL,
    bytes INTEGER NOT NULL, source VARCHAR NOT NULL, created_at FLOAT NOT NULL, requests INTEGER NOT NULL,
    tokens INTEGER NOT NULL, last_used FLOAT, PRIMARY KEY (name, number),
    FOREIGN KEY(name) REFERENCES adapters (name) ON DELETE CASCADE);
INSERT INTO adapters VALUES ('a', 2, 'stamp', 'words', 1, 5.0), ('team/b', 1, NULL, '', 0, 6.0);
INSERT INTO versions VALUES ('a', 1, 'd1', 4, 8.0, '["q_proj"]', 10, 40, 'upload', 5.0, 3, 50, 9.0),
    ('a', 2, 'd2', 4, 8.0, '["q_proj", "v_proj"]', 10, 40, 'folder:a', 6.0, 0, 0, NULL),
    ('team/b', 1, 'd1', 4, 8.0, '[]', 10, 40, 'upload', 6.0, 1, 2, 3.0);
INSERT INTO facts VALUES ('targets', 'f');
PRAGMA user_version = 1;
"""


@pytest.fixture
def of_schema_1(tmp_path: Path) -> Path:
    path = tmp_path / "registry.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA_1)
    return path


def test_the_first_schema_becomes_the_present_one(of_schema_1: Path) -> None:
    for _ in range(2):
        database = Database(of_schema_1)
        catalogue = Catalogue(database)
        (a, versions), (b, (only,)) = catalogue.load()
        assert a == AdapterRow("a", 2, "stamp", "words", True, 5.0, "default", False)
        assert [(v.tenant, v.number, v.digest, v.content) for v in versions] == [
            ("default", 1, "d1", "d1"),
            ("default", 2, "d2", "d2"),
        ]
        assert (versions[0].requests, versions[0].tokens, versions[0].last_used) == (3, 50, 9.0)
        assert versions[1].targets == ("q_proj", "v_proj")
        assert (b.name, only.digest) == ("team/b", "d1")
        assert catalogue.fact("targets") == "f"
        database.close()
    database = Database(of_schema_1)
    catalogue = Catalogue(database)
    catalogue.delete(AdapterId("default", "a"))  # takes its versions along, as before
    assert [row.name for row, _ in catalogue.load()] == ["team/b"]
    with database.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM versions").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA user_version").scalar() == SCHEMA_VERSION
    database.close()


def test_the_second_schema_gets_usage_and_quotas(tmp_path: Path) -> None:
    """2 was this one without two tables; what is in the others stays."""
    folder = DataFolder(tmp_path / "data")
    folder.catalogue.set_fact("a", "b")
    folder.close()
    path = tmp_path / "data" / "registry.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("DROP TABLE usage; DROP TABLE quotas; PRAGMA user_version = 2;")
    folder = DataFolder(tmp_path / "data")
    assert folder.catalogue.fact("a") == "b"
    assert folder.usage.lines(UsageQuery()) == []
    folder.close()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        assert connection.execute("SELECT count(*) FROM quotas").fetchone() == (0,)


def test_a_migration_that_is_cut_off_leaves_the_first_schema(of_schema_1: Path) -> None:
    """One transaction: what is killed on the way begins again the next time."""

    def cut(connection: sa.Connection, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("DROP TABLE adapters_1"):
            raise KeyboardInterrupt

    sa.event.listen(sa.Engine, "before_cursor_execute", cut)
    try:
        with pytest.raises(KeyboardInterrupt):
            Database(of_schema_1)
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", cut)
    with closing(sqlite3.connect(of_schema_1)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        assert connection.execute("SELECT count(*) FROM versions").fetchone() == (3,)
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        assert "keys" not in names
    Database(of_schema_1).close()
