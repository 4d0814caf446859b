"""The tables of `registry.db`, and how a file of an earlier Chorus becomes one of this."""

from __future__ import annotations

import sqlalchemy as sa

from server.access.caller import DEFAULT_TENANT

SCHEMA_VERSION = 3

METADATA = sa.MetaData()
ADAPTERS = sa.Table(
    "adapters",
    METADATA,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("current", sa.Integer, nullable=False),
    sa.Column("folder_stamp", sa.String),
    sa.Column("description", sa.String, nullable=False),
    sa.Column("pinned", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("shared", sa.Boolean, nullable=False),
)
VERSIONS = sa.Table(
    "versions",
    METADATA,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("digest", sa.String, nullable=False),
    sa.Column("content", sa.String, nullable=False),
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
    sa.ForeignKeyConstraint(["tenant", "name"], ["adapters.tenant", "adapters.name"], ondelete="CASCADE"),
)
FACTS = sa.Table(
    "facts",
    METADATA,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("value", sa.String, nullable=False),
)
KEYS = sa.Table(
    "keys",
    METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("digest", sa.String, nullable=False),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Column("revoked_at", sa.Float),
    sa.Column("last_used", sa.Float),
)
USAGE = sa.Table(
    "usage",
    METADATA,
    sa.Column("hour", sa.Integer, primary_key=True),
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("adapter", sa.String, primary_key=True),
    sa.Column("version", sa.String, primary_key=True),
    sa.Column("journal", sa.String, primary_key=True),
    sa.Column("requests", sa.Integer, nullable=False),
    sa.Column("prompt_tokens", sa.Integer, nullable=False),
    sa.Column("cached_tokens", sa.Integer, nullable=False),
    sa.Column("completion_tokens", sa.Integer, nullable=False),
    sqlite_with_rowid=False,
)
QUOTAS = sa.Table(
    "quotas",
    METADATA,
    sa.Column("kind", sa.String, primary_key=True),
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("limits", sa.JSON, nullable=False),
)

# What a file of each version has at least.
TABLES = {
    1: {"adapters", "versions", "facts"},
    2: {"adapters", "versions", "facts", "keys"},
    3: set(METADATA.tables),
}


def upgrade(connection: sa.Connection, version: int) -> None:
    """From `version`, 0 for an empty file, to SCHEMA_VERSION, within the caller's transaction."""
    if version == 1:
        _bring_tenants(connection)
    else:  # a new file; or 2, which lacks tables and no column
        METADATA.create_all(connection)
    connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _bring_tenants(connection: sa.Connection) -> None:
    """1 -> 2: whatever there was belongs to the default tenant. SQLite cannot change a primary key, so the
    tables are made anew; the versions go first, or dropping the adapters would take them along."""
    old = {name: f"{name}_1" for name in ("adapters", "versions")}
    for name, renamed in old.items():
        connection.exec_driver_sql(f"ALTER TABLE {name} RENAME TO {renamed}")
    METADATA.create_all(connection)
    for table, added in (
        (ADAPTERS, {"tenant": "?", "shared": "0"}),
        (VERSIONS, {"tenant": "?", "content": "digest"}),
    ):
        kept = [column.name for column in table.columns if column.name not in added]
        names, values = ", ".join([*kept, *added]), ", ".join([*kept, *added.values()])
        statement = f"INSERT INTO {table.name} ({names}) SELECT {values} FROM {old[table.name]}"
        connection.exec_driver_sql(statement, (DEFAULT_TENANT,))
    for name in ("versions", "adapters"):
        connection.exec_driver_sql(f"DROP TABLE {old[name]}")
