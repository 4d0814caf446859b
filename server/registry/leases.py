"""Who uses a version still: leases on it, and its end when no name leads to it and the last user has left."""

from __future__ import annotations

from collections.abc import Iterable

from server.registry.books import Books
from server.registry.records import AdapterBooks, Lease, Retired, VersionBooks
from server.registry.store import ContentStore


class Leases:
    """Counts in the books, which it locks by itself where nothing else is said. Frees files in the store."""

    def __init__(self, books: Books, store: ContentStore) -> None:
        self._books = books
        self._store = store

    def lease(self, version: VersionBooks) -> Lease:
        """One more user. The books' lock is held."""
        version.leases += 1
        return Lease(version.info, lambda: self._give_back(version))

    def retire(self, adapter: AdapterBooks, versions: Iterable[VersionBooks]) -> tuple[Retired, ...]:
        """No name leads to these versions any more; those that nobody uses go now."""
        with self._books.lock:
            versions = list(versions)
            retired = tuple(version.retire() for version in versions)
            if adapter not in self._books.draining:
                for version in versions:
                    del adapter.versions[version.info.number]
            unused = [version for version in versions if not version.leases]
        for version in unused:
            self._free(version)
        return retired

    def _give_back(self, version: VersionBooks) -> None:
        with self._books.lock:
            version.leases -= 1
            last = not version.leases and not version.listed
        if last:
            self._free(version, on_loop=True)

    def _free(self, version: VersionBooks, *, on_loop: bool = False) -> None:
        def gone() -> None:
            books = self._books
            with books.lock:
                version.freed = True
                if not self._store.holds(version.info.digest):
                    books.loads.pop(version.info.digest, None)
                books.draining = [a for a in books.draining if not all(v.freed for v in a.versions.values())]
            if version.gone is not None:  # which it is from `retire` on
                version.gone.set_result(None)

        if version.stored:
            self._store.drop(version.info.digest, then=gone, on_loop=on_loop)
        else:
            gone()
