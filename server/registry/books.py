"""What the registry knows of every name, in memory: the books themselves, and how a tenant reads them."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from heapq import merge
from itertools import groupby, islice

from server.errors import Forbidden, ModelNotFound
from server.registry.catalogue import AdapterId
from server.registry.records import AdapterBooks, AdapterRecord, AdapterVersion, LastLoad


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
        self.loads: dict[str, LastLoad] = {}  # by digest
        self._names: dict[str, list[str]] = {}  # of `adapters`, by tenant, sorted: pages are cut from them

    def find(self, adapter: AdapterId) -> AdapterBooks | None:
        """A tenant's own, else the one that another shares."""
        return self.adapters.get(adapter) or self.adapters.get(self.shared.get(adapter.name, adapter))

    def record(self, adapter: AdapterId) -> AdapterRecord | None:
        """The same as a snapshot, and of names that are only on their way in or out."""
        with self.lock:
            if books := self.adapters.get(adapter):
                return books.record("failed" if books.current.error else "ready", self.loads)
            if adapter in self.claims:
                return AdapterRecord(adapter.name, "validating", None, None, tenant=adapter.tenant)
            if adapter in self.failed:
                reason = self.failed[adapter]
                return AdapterRecord(adapter.name, "failed", reason, None, tenant=adapter.tenant)
            if (books := self.find(adapter)) and not books.current.error:
                return books.record("ready", self.loads)
            last = next((books for books in reversed(self.draining) if books.row.id == adapter), None)
            return last.record("draining", self.loads) if last else None

    def current(self, wanted: Callable[[AdapterBooks], bool]) -> list[AdapterVersion]:
        """The current versions that can be used, whoever's they are."""
        with self.lock:
            chosen = [books.current for books in self.adapters.values() if wanted(books)]
            return [version.info for version in chosen if version.error is None]

    def add(self, adapter: AdapterId, books: AdapterBooks) -> None:
        """The lock is held."""
        self.adapters[adapter] = books
        insort(self._names.setdefault(adapter.tenant, []), adapter.name)

    def remove(self, adapter: AdapterId) -> AdapterBooks:
        """Out of sight; it stays in the books while it drains. The lock is held."""
        names = self._names[adapter.tenant]
        del names[bisect_left(names, adapter.name)]
        if self.shared.get(adapter.name) == adapter:
            del self.shared[adapter.name]
        books = self.adapters.pop(adapter)
        self.draining.append(books)
        return books

    def records(self, tenant: str, after: str, most: int | None) -> Iterator[AdapterRecord]:
        """Of the first `most` names that `tenant` sees after `after`, whatever their state, sorted. The books
        may change in between: to hold them for many thousands would hold up every request."""
        with self.lock:
            passing = [*self.claims, *self.failed, *(books.row.id for books in self.draining)]
            names = self._later(tenant, after, {each.name for each in passing if each.tenant == tenant})
        for name in islice(names, most):
            record = self.record(AdapterId(tenant, name))
            if record is not None:
                yield record

    def ready(self, tenant: str, after: str, most: int | None) -> list[AdapterVersion]:
        """The current versions of the first `most` names after `after` that `tenant` can ask for, sorted."""
        with self.lock:
            names = self._later(tenant, after, set())
        found = (self.find(AdapterId(tenant, name)) for name in names)
        ready = (books.current for books in found if books is not None)
        return list(islice((version.info for version in ready if version.error is None), most))

    def _later(self, tenant: str, after: str, others: set[str]) -> Iterator[str]:
        """The names after `after`, sorted, each once: the tenant's own, what is shared, and `others`. What is
        done here at once is a copy; the rest is done name by name, so that other threads run meanwhile."""
        own = self._names.get(tenant, [])
        rest = sorted(name for name in others.union(self.shared) if name > after)
        merged = merge(own[bisect_right(own, after) :], rest)
        return (name for name, _ in groupby(merged))


def unknown_name(name: str) -> ModelNotFound:
    """ModelNotFound of the management routes, where the field is called `name`."""
    error = ModelNotFound(name)
    error.param = "name"
    return error


def not_yours(name: str) -> Forbidden:
    """Of a change to what another tenant owns."""
    return Forbidden(f"The adapter `{name}` is shared with you; only its owner can change it.", param="name")
