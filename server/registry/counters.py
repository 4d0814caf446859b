"""How much each version was used: counted in memory, written to the catalogue every few seconds."""

from __future__ import annotations

import logging
import threading
import time

from server.access.flusher import Flusher
from server.registry.catalogue import Catalogue
from server.registry.records import VersionBooks

_FLUSH_SECONDS = 10.0

_log = logging.getLogger(__name__)


class Counters:
    """Owns the counters in the registry's books, which `lock`, the registry's, guards. Thread-safe."""

    def __init__(self, catalogue: Catalogue, lock: threading.Lock) -> None:
        self._catalogue = catalogue
        self._lock = lock
        self._unsaved: set[VersionBooks] = set()
        self._flusher = Flusher(self.flush, _FLUSH_SECONDS, "registry-flush")

    def close(self) -> None:
        """Write what is left."""
        self._flusher.close()

    def count(self, books: VersionBooks, tokens: int) -> None:
        """One request more, and the tokens it generated. The lock is held."""
        books.requests += 1
        books.tokens += tokens
        books.last_used = time.time()
        self._unsaved.add(books)
        self._flusher.when_due()

    def flush(self) -> None:
        """Write the counters that changed. A full disk loses nothing: they stay unsaved."""
        with self._lock:
            unsaved = {books for books in self._unsaved if books.listed}  # of others the row is gone
            self._unsaved = set()
            rows = [books.row() for books in unsaved]
        try:
            self._catalogue.count(rows)
        except Exception:
            _log.exception("could not write how much the adapters were used")
            with self._lock:
                self._unsaved |= unsaved
