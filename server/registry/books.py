"""What the registry knows of every name, in memory: the books themselves, and how a tenant reads them."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterable, Iterator

from server.registry.catalogue import AdapterId
from server.registry.records import AdapterBooks, AdapterRecord, AdapterVersion


class Books:
    """The books of all tenants. `lock` guards them, and whoever writes holds it.

    A tenant sees its own names, then what others share; of anybody else's there is no trace.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.adapters: dict[AdapterId, AdapterBooks] = {}
        self.shared: dict[str, AdapterId] = {}  # by name: no two shared ones have the same
        self.claims: set[AdapterId] = set()
        self.failed: dict[AdapterId, str] = {}
        self.draining: list[AdapterBooks] = []
        self.load_ms: dict[str, float] = {}  # by digest

    def find(self, adapter: AdapterId) -> AdapterBooks | None:
        """A tenant's own, else the one that another shares. The lock is held."""
        return self.adapters.get(adapter) or self.adapters.get(self.shared.get(adapter.name, adapter))

    def record(self, adapter: AdapterId) -> AdapterRecord | None:
        """The same as a snapshot, and of names that are only on their way in or out."""
        with self.lock:
            if books := self.adapters.get(adapter):
                return books.record("failed" if books.current.error else "ready", self.load_ms)
            if adapter in self.claims:
                return AdapterRecord(adapter.name, "validating", None, None, tenant=adapter.tenant)
            if adapter in self.failed:
                reason = self.failed[adapter]
                return AdapterRecord(adapter.name, "failed", reason, None, tenant=adapter.tenant)
            if (books := self.find(adapter)) and not books.current.error:
                return books.record("ready", self.load_ms)
            last = next((books for books in reversed(self.draining) if books.row.id == adapter), None)
            return last.record("draining", self.load_ms) if last else None

    def records(self, tenant: str, after: str, most: int | None) -> Iterator[AdapterRecord]:
        """Of every name that `tenant` sees, whatever its state, sorted. The books may change in between: to
        hold them for many thousands would hold up every request."""
        with self.lock:
            ids = [*self.adapters, *self.claims, *self.failed, *(books.row.id for books in self.draining)]
            shared = list(self.shared)
        names = {each.name for each in ids if each.tenant == tenant}
        for name in _first(names.union(shared), after, most):
            record = self.record(AdapterId(tenant, name))
            if record is not None:
                yield record

    def ready(self, tenant: str, after: str, most: int | None) -> list[AdapterVersion]:
        """The current version of every name that `tenant` can ask for, sorted by name."""
        with self.lock:
            adapters = list(self.adapters.values())
            shared = [self.adapters[each] for each in self.shared.values()]
        own = {books.row.name: books for books in adapters if books.row.tenant == tenant}
        seen = {books.row.name: books for books in shared} | own
        names = (name for name, books in seen.items() if books.current.error is None)
        return [seen[name].current.info for name in _first(names, after, most)]


def _first(names: Iterable[str], after: str, most: int | None) -> list[str]:
    """The first `most` of those that come after `after`. Not by a sort of all where few are wanted: that
    would let no other thread run meanwhile."""
    later = (name for name in names if name > after)
    return sorted(later) if most is None else heapq.nsmallest(most, later)
