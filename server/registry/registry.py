"""The adapters this server knows: names, versions, who uses them now, and how much they were used.

Reads (`acquire`, `get`, `records`) touch memory only and are safe on the event loop. Writes go through a
`Publication` and belong in a thread: judge, sync files, rename, commit, and only then does a name change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from server.access.caller import DEFAULT_TENANT
from server.config import Limits
from server.errors import ChorusError, Conflict, InvalidRequest, ModelNotFound
from server.messages import LoraTarget
from server.peft.format import LoraAdapter, judge
from server.registry.books import Books, not_yours, unknown_name
from server.registry.catalogue import AdapterId, AdapterRow
from server.registry.counters import Counters
from server.registry.damage import Damage
from server.registry.data_folder import DataFolder
from server.registry.leases import Leases
from server.registry.publication import Publication
from server.registry.records import (
    AdapterBooks,
    AdapterRecord,
    AdapterVersion,
    LastLoad,
    Lease,
    Published,
    Retired,
    VersionBooks,
    check_name,
    identity,
    split_version,
)
from server.registry.store import Staging
from server.registry.stored_room import QuotaOf, StoredRoom

KEPT_VERSIONS = 5  # of one name: the newest ones stay addressable as name@version

_log = logging.getLogger(__name__)


class Registry:
    """Every adapter known to this server. All public methods are thread-safe."""

    def __init__(
        self,
        folder: DataFolder,
        targets: Sequence[LoraTarget],
        base_parameters: int,
        limits: Limits,
        base_name: str,
        quota_of: QuotaOf = lambda _: None,
    ) -> None:
        self.base_parameters = base_parameters
        self._folder = folder
        self._store = folder.store
        self._catalogue = folder.catalogue
        self._targets = tuple(targets)
        self._limits = limits
        self._base_name = base_name
        self._judging = threading.Lock()
        self._books = Books()
        self._lock = self._books.lock
        self._room = StoredRoom(self._books, quota_of)
        self._leases = Leases(self._books, folder.store)
        self.damage = Damage(self._books)
        self._counters = Counters(self._catalogue, self._lock)

    @classmethod
    def open(
        cls,
        folder: DataFolder,
        targets: Sequence[LoraTarget],
        base_parameters: int,
        limits: Limits,
        base_name: str,
        quota_of: QuotaOf = lambda _: None,
    ) -> Registry:
        """Take the folder over and bring back what it holds; sweep what a killed server left.

        `base_name` is taken: clients ask for the base model by it. The folder is closed with the registry, or
        here when that cannot be opened.
        """
        with ExitStack() as undo:
            undo.callback(folder.close)
            registry = cls(folder, targets, base_parameters, limits, base_name, quota_of)
            registry._restore()
            undo.pop_all()
        return registry

    def close(self) -> None:
        """Write the counters and let the next server in."""
        self._counters.close()
        self._folder.close()

    # reading

    def acquire(self, name: str, *, tenant: str = DEFAULT_TENANT, own: bool = False) -> Lease:
        """A lease on the current version of `name`, or on `name@version` (its number, or six or more digits
        of its digest). Look-up and reference count are one step. The tenant's own name comes first, then what
        others share. Raises ModelNotFound; with `own`, Forbidden for what is only shared with the tenant."""
        base, wanted = split_version(name)
        with self._lock:
            adapter = self._books.find(AdapterId(tenant, base))
            version = adapter.find(wanted) if adapter else None
            if adapter is None or version is None:
                raise ModelNotFound(name)
            if version.error is not None:  # others need not know why
                raise ModelNotFound(name, version.error if adapter.row.tenant == tenant else None)
            if own and adapter.row.tenant != tenant:
                raise not_yours(base)
            return self._leases.lease(version)

    def get(self, name: str, *, tenant: str = DEFAULT_TENANT) -> AdapterRecord:
        """What is known of a name. Raises ModelNotFound (param `name`)."""
        record = self._books.record(AdapterId(tenant, name))
        if record is None:
            raise unknown_name(name)
        return record

    def current_versions(
        self, *, tenant: str = DEFAULT_TENANT, after: str = "", most: int | None = None
    ) -> list[AdapterVersion]:
        """The current version of every adapter that the tenant can ask for, sorted by name: the first `most`
        of those after `after`."""
        return self._books.ready(tenant, after, most)

    def records(
        self, *, tenant: str = DEFAULT_TENANT, after: str = "", most: int | None = None
    ) -> Iterator[AdapterRecord]:
        """What is known of every name that the tenant sees, sorted, whatever its state: the first `most` of
        those after `after`. The books may change in between."""
        return self._books.records(tenant, after, most)

    @property
    def size(self) -> int:
        """How many names there are, of all tenants."""
        return len(self._books.adapters)

    def holds(self, digest: str) -> bool:
        """Whether any version or lease still needs this content."""
        return self._store.holds(digest)

    def pinned(self) -> list[AdapterVersion]:
        """The versions that were asked to stay in accelerator memory, of all tenants."""
        return self._books.current(lambda books: books.row.pinned)

    def current_of(self, digests: Collection[str]) -> list[AdapterVersion]:
        """The current versions that these are the digests of, of all tenants."""
        return self._books.current(lambda books: books.current.info.digest in digests)

    # use

    def served(self, version: AdapterVersion, tokens: int) -> None:
        """Count one request and the tokens it generated; written to disk every few seconds and at close."""
        with self._lock:
            adapter = self._books.adapters.get(version.id)
            books = adapter.versions.get(version.number) if adapter else None
            if books is not None and books.info == version:  # else deleted meanwhile
                self._counters.count(books, tokens)

    def flush(self) -> None:
        """Write the counters that changed, now."""
        self._counters.flush()

    def loaded(self, digest: str, load: LastLoad) -> None:
        """Note how a load went that was asked for, or that was to bring it back."""
        with self._lock:
            if self._store.holds(digest):
                self._books.loads[digest] = load

    # writing

    def publication(
        self, *, create: bool, replace: bool, expected_bytes: int = 0, tenant: str = DEFAULT_TENANT
    ) -> Publication:
        """Begin a write that may create a name, give a known one a new version, or both."""
        staging = self._store.staging(expected_bytes)
        return Publication(self, staging, tenant, create=create, replace=replace)

    def look(self, adapter: AdapterId, *, create: bool, replace: bool) -> object:
        """What a write of it would take the place of, if anything. See Publication.begin."""
        check_name(adapter.name)
        if adapter.name == self._base_name:
            raise InvalidRequest(f"`{adapter.name}` is the name of the base model.", param="name")
        with self._lock:
            return self._look(adapter, create=create, replace=replace)

    def claim(self, adapter: AdapterId, *, create: bool, replace: bool, seen: object) -> None:
        """Keep other writers off it until `unclaim`, if a look at it shows what was `seen`."""
        name, claims = adapter.name, self._books.claims
        with self._lock:
            if self._look(adapter, create=create, replace=replace) is not seen:
                raise Conflict(f"The adapter `{name}` was changed by another call meanwhile.", param="name")
            if adapter in claims:
                raise Conflict(f"The adapter `{name}` is being written by another call.", param="name")
            claims.add(adapter)

    def _look(self, adapter: AdapterId, *, create: bool, replace: bool) -> VersionBooks | None:
        name, books = adapter.name, self._books.adapters.get(adapter)
        if books is not None and not replace:
            raise Conflict(f"The adapter `{name}` exists already.", param="name")
        if books is None and not create:
            raise not_yours(name) if name in self._books.shared else unknown_name(name)
        return books.current if books else None

    def unclaim(self, adapter: AdapterId) -> None:
        with self._lock:
            self._books.claims.discard(adapter)

    def judge(self, folder: Path) -> LoraAdapter:
        """Check config and tensor header against base model and engine; see `peft.format.judge`. One at a
        time: several threads of Python's at once would keep the event loop from its turn."""
        with self._judging:
            return judge(folder, self._targets, self._limits)

    def commit(
        self,
        adapter: AdapterId,
        judged: LoraAdapter,
        staging: Staging,
        content: str,
        *,
        provenance: str,
        description: str | None,
        stamp: str | None,
    ) -> Published:
        """The last steps of a publication by the holder of the name's claim: files, then row, then memory.

        Raises StoredQuotaExceeded."""
        digest = identity(content, adapter.tenant)
        with self._room.taken_by(adapter, digest, judged.weight_bytes):
            return self._commit(adapter, judged, staging, content, digest, provenance, description, stamp)

    def _commit(
        self,
        adapter: AdapterId,
        judged: LoraAdapter,
        staging: Staging,
        content: str,
        digest: str,
        provenance: str,
        description: str | None,
        stamp: str | None,
    ) -> Published:
        with self._lock:
            old = self._books.adapters.get(adapter)
        now = time.time()
        row = old.row if old else AdapterRow(adapter.name, 0, None, "", False, now, adapter.tenant)
        row = dataclasses.replace(
            row,
            folder_stamp=stamp or row.folder_stamp,
            description=row.description if description is None else description,
        )
        if old and old.current.info.digest == digest and old.current.error is None:
            if row != old.row:
                self._update(old, folder_stamp=row.folder_stamp, description=row.description)
            return Published(old.current.info, "unchanged")
        number = max(old.versions, default=0) + 1 if old else 1
        info = AdapterVersion(
            name=adapter.name, number=number, digest=digest, path=self._store.folder(digest),
            rank=judged.rank, alpha=judged.alpha, targets=judged.target_modules,
            parameters=judged.parameters, bytes=judged.weight_bytes, source=provenance, created_at=now,
            tenant=adapter.tenant, content=content,
        )  # fmt: skip
        version = VersionBooks(info)
        row = dataclasses.replace(row, current=number)
        beyond = list(old.versions.values())[: 1 - KEPT_VERSIONS] if old else []
        self._store.add(staging, digest, mend=self.damage.known(digest))
        try:
            self._catalogue.publish(row, version.row(), [v.info.number for v in beyond])
        except BaseException:
            self._store.drop(digest)
            raise
        with self._lock:
            books = old or AdapterBooks(row)
            books.versions[number] = version
            books.row = dataclasses.replace(row, pinned=books.row.pinned)
            if old is None:
                self._books.add(adapter, books)
            self._books.failed.pop(adapter, None)
        self.damage.mended(digest)
        retired = self._leases.retire(books, beyond)
        return Published(info, "replaced" if old else "created", retired, books.row.pinned)

    def delete(self, name: str, *, tenant: str = DEFAULT_TENANT) -> tuple[Retired, ...]:
        """Forget a name: new requests do not find it, running ones finish, then its files go.

        Raises ModelNotFound (param `name`), Forbidden for what is only shared with the tenant, Conflict while
        it is being written.
        """
        adapter = AdapterId(tenant, name)
        with self._lock:
            if adapter not in self._books.adapters and self._books.failed.pop(adapter, None) is not None:
                return ()
        with self._claimed(adapter):
            self._catalogue.delete(adapter)
            with self._lock:
                books = self._books.remove(adapter)
            return self._leases.retire(books, books.versions.values())

    def set_pinned(self, name: str, pinned: bool, *, tenant: str = DEFAULT_TENANT) -> None:
        """Remember that a name is to stay in accelerator memory. Raises ModelNotFound."""
        with self._lock:
            adapter = self._books.adapters.get(AdapterId(tenant, name))
        if adapter is None:
            raise unknown_name(name)
        if adapter.row.pinned != pinned:
            self._update(adapter, pinned=pinned)

    def set_shared(self, name: str, shared: bool, *, tenant: str = DEFAULT_TENANT) -> None:
        """Let every tenant use it, or no other any more. Raises ModelNotFound, Conflict where another shared
        one has this name, or while it is being written."""
        adapter = AdapterId(tenant, name)
        with self._claimed(adapter):
            with self._lock:
                books, holder = self._books.adapters[adapter], self._books.shared.get(name)
                if shared and holder not in (None, adapter):
                    raise Conflict(f"Another tenant shares an adapter `{name}`.", param="name")
                if shared:
                    self._books.shared[name] = adapter
            try:
                self._update(books, shared=shared)
            finally:
                with self._lock:
                    if not books.row.shared and self._books.shared.get(name) == adapter:
                        del self._books.shared[name]

    def folder_stamps(self) -> dict[str, str]:
        """Names that came from the adapters folder -> the stamp of what was read then, '' if it is to be
        read again. A name that was only ever uploaded is not among them."""
        with self._lock:
            adapters = [a for a in self._books.adapters.values() if a.row.folder_stamp is not None]
            return {a.row.name: "" if a.current.error else a.row.folder_stamp or "" for a in adapters}

    def failed(self, name: str, reason: str) -> None:
        """List a name that could not be registered, with the reason; one that serves already goes on."""
        adapter = AdapterId(DEFAULT_TENANT, name)
        with self._lock:
            if adapter not in self._books.adapters:
                self._books.failed[adapter] = reason

    # books

    @contextmanager
    def _claimed(self, adapter: AdapterId) -> Iterator[None]:
        """Around a change of a name that is there."""
        seen = self.look(adapter, create=False, replace=True)
        self.claim(adapter, create=False, replace=True, seen=seen)
        try:
            yield
        finally:
            self.unclaim(adapter)

    def _restore(self) -> None:
        """At start: rows to books, a hold for each version, and the judgement again if the base changed."""
        fingerprint = hashlib.sha256(msgspec.json.encode(self._targets)).hexdigest()
        known = self._catalogue.fact("targets")
        agreed = True
        rows = self._catalogue.load()
        stored = self._store.hold_all(version.digest for _, versions in rows for version in versions)
        for row, versions in rows:
            adapter = AdapterBooks(row)
            self._books.add(row.id, adapter)
            if row.shared:
                self._books.shared[row.name] = row.id
            for version_row in versions:
                version = VersionBooks.of_row(version_row, self._store.folder(version_row.digest))
                adapter.versions[version_row.number] = version
                version.stored = version_row.digest in stored
                if not version.stored:
                    version.error = "its files are missing from the data folder"
                elif known != fingerprint:
                    try:
                        self.judge(version.info.path)
                    except ChorusError as error:
                        agreed = False
                        version.error = f"does not fit the base model any more: {error.message}"
                if version.error:
                    _log.error("adapter %s@%d %s", version.info.label, version.info.number, version.error)
        if agreed and known != fingerprint:
            self._catalogue.set_fact("targets", fingerprint)
        self._store.sweep()

    def _update(self, adapter: AdapterBooks, **fields: object) -> None:
        """Columns of a row, on disk and then in memory."""
        self._catalogue.update(adapter.row.id, **fields)
        with self._lock:
            adapter.row = dataclasses.replace(adapter.row, **fields)  # type: ignore[arg-type]  # its own columns
