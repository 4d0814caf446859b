"""Versions whose stored files turned out not to be what was stored."""

from __future__ import annotations

import logging

from server.errors import DamagedAdapter
from server.peft.digest import check_digest
from server.registry.books import Books
from server.registry.records import AdapterVersion, VersionBooks

_REASON = "its stored files are damaged; upload it again"

_log = logging.getLogger(__name__)


class Damage:
    """Finds and marks them in the registry's books. A digest is one tenant's, and so is the mark."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._digests: set[str] = set()  # of versions that are marked; guarded by the books' lock

    def recheck(self, version: AdapterVersion) -> None:
        """Read a version's files again: damaged ones are not served, under any name, until they are uploaded
        again. Belongs in a thread."""
        try:
            check_digest(version.path, version.content)
        except (DamagedAdapter, OSError) as error:
            _log.error("adapter %s@%d is damaged: %s", version.label, version.number, error)
            with self._books.lock:
                self._digests.add(version.digest)
                for books in self._holding(version.digest):
                    books.error = _REASON

    def known(self, digest: str) -> bool:
        """Whether what lies in the store under this digest is marked."""
        with self._books.lock:
            return digest in self._digests

    def mended(self, digest: str) -> None:
        """Its files were stored anew: what was marked is served again."""
        with self._books.lock:
            if digest in self._digests:
                self._digests.discard(digest)
                for books in self._holding(digest):
                    books.error = None if books.error == _REASON else books.error

    def _holding(self, digest: str) -> list[VersionBooks]:
        versions = (books for adapter in self._books.adapters.values() for books in adapter.versions.values())
        return [books for books in versions if books.info.digest == digest]
