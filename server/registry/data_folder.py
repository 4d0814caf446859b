"""Everything that a server keeps on disk, opened in one go: its lock, its files, its database."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from server.registry.catalogue import Catalogue
from server.registry.database import Database
from server.registry.key_table import KeyTable
from server.registry.quota_table import QuotaTable
from server.registry.store import ContentStore
from server.registry.usage_table import UsageTable


class DataFolder:
    """Ours alone until it is closed. Raises DataFolderError, and leaves everything as it was then."""

    def __init__(self, path: Path) -> None:
        with ExitStack() as undo:
            self.store = ContentStore(path)
            undo.callback(self.store.close)
            lost = "stored adapters are there" if any(self.store.stored()) else None
            self._database = Database(path / "registry.db", new_is_wrong=lost)
            undo.pop_all()
        self.catalogue = Catalogue(self._database)
        self.keys = KeyTable(self._database)
        self.usage = UsageTable(self._database)
        self.quotas = QuotaTable(self._database)

    def close(self) -> None:
        """Let the next server in. Idempotent."""
        self.store.close()
        self._database.close()
