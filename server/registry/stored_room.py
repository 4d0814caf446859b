"""How much each tenant may store: judged in the moment of a publication, one of a tenant after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.errors import StoredQuotaExceeded
from server.registry.books import Books
from server.registry.catalogue import AdapterId
from server.usage.quotas import Quota

QuotaOf = Callable[[str], Quota | None]


class StoredRoom:
    """`quota_of`: the quota of a tenant, where it has one."""

    def __init__(self, books: Books, quota_of: QuotaOf) -> None:
        self._books = books
        self._quota_of = quota_of
        self._publishing = threading.Lock()

    @contextmanager
    def taken_by(self, adapter: AdapterId, digest: str, size: int) -> Iterator[None]:
        """Around a publication of a version of `size` bytes. Raises StoredQuotaExceeded before it."""
        quota = self._quota_of(adapter.tenant)
        if quota is None or (quota.adapters_stored is None and quota.bytes_stored is None):
            yield
            return
        with self._publishing:
            self._judge(quota, adapter, digest, size)
            yield

    def _judge(self, quota: Quota, adapter: AdapterId, digest: str, size: int) -> None:
        with self._books.lock:
            known = [books for each, books in self._books.adapters.items() if each.tenant == adapter.tenant]
            versions = [version.info for books in known for version in books.versions.values()]
            new = adapter not in self._books.adapters
        if new and quota.adapters_stored is not None and len(known) >= quota.adapters_stored:
            raise StoredQuotaExceeded(
                f"This tenant stores {len(known)} adapters, its quota is {quota.adapters_stored}.",
                param="adapters_stored",
            )
        sizes = {version.digest: version.bytes for version in versions}
        held = sum(sizes.values())
        if digest not in sizes and quota.bytes_stored is not None and held + size > quota.bytes_stored:
            raise StoredQuotaExceeded(
                f"This tenant stores {held} bytes of weights, and {size} more would exceed its quota of "
                f"{quota.bytes_stored}.",
                param="bytes_stored",
            )
