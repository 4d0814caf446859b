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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from server.config import Limits
from server.errors import ChorusError, Conflict, InvalidRequest, ModelNotFound
from server.messages import LoraTarget
from server.peft.format import LoraAdapter, judge
from server.registry.catalogue import AdapterRow, Catalogue
from server.registry.counters import Counters
from server.registry.damage import Damage
from server.registry.publication import Publication
from server.registry.records import (
    AdapterBooks,
    AdapterRecord,
    AdapterVersion,
    Lease,
    Published,
    Retired,
    VersionBooks,
    check_name,
    split_version,
)
from server.registry.store import ContentStore, Staging

KEPT_VERSIONS = 5  # of one name: the newest ones stay addressable as name@version

_log = logging.getLogger(__name__)


class Registry:
    """Every adapter known to this server. All public methods are thread-safe."""

    def __init__(
        self,
        store: ContentStore,
        catalogue: Catalogue,
        targets: Sequence[LoraTarget],
        base_parameters: int,
        limits: Limits,
        base_name: str,
    ) -> None:
        self.base_parameters = base_parameters
        self._store = store
        self._catalogue = catalogue
        self._targets = tuple(targets)
        self._limits = limits
        self._base_name = base_name
        self._lock = threading.Lock()
        self._judging = threading.Lock()
        self._adapters: dict[str, AdapterBooks] = {}
        self._claims: set[str] = set()
        self._failed: dict[str, str] = {}
        self._draining: list[AdapterBooks] = []
        self._load_ms: dict[str, float] = {}  # by digest
        self.damage = Damage(self._adapters, self._lock)
        self._counters = Counters(catalogue, self._lock)

    @classmethod
    def open(
        cls,
        store: ContentStore,
        targets: Sequence[LoraTarget],
        base_parameters: int,
        limits: Limits,
        base_name: str,
    ) -> Registry:
        """Take the store over and bring back what it holds; sweep what a killed server left.

        `base_name` is taken: clients ask for the base model by it. The store is closed with the registry, or
        here when that cannot be opened.
        """
        with ExitStack() as undo:
            undo.callback(store.close)
            catalogue = Catalogue(store.data_dir / "registry.db")
            undo.callback(catalogue.close)
            registry = cls(store, catalogue, targets, base_parameters, limits, base_name)
            registry._restore()
            undo.pop_all()
        return registry

    def close(self) -> None:
        """Write the counters and let the next server in."""
        self._counters.close()
        self._store.close()
        self._catalogue.close()

    # reading

    def acquire(self, name: str) -> Lease:
        """A lease on the current version of `name`, or on `name@version` (its number, or six or more digits
        of its digest). Look-up and reference count are one step. Raises ModelNotFound."""
        base, wanted = split_version(name)
        with self._lock:
            adapter = self._adapters.get(base)
            version = adapter.find(wanted) if adapter else None
            if version is None or version.error is not None:
                raise ModelNotFound(name, version.error if version else None)
            version.leases += 1
        return Lease(version.info, lambda: self._give_back(version))

    def get(self, name: str) -> AdapterRecord:
        """What is known of a name. Raises ModelNotFound (param `name`)."""
        with self._lock:
            record = self._record(name)
        if record is None:
            raise _unknown(name)
        return record

    def current_versions(self) -> list[AdapterVersion]:
        """The current version of every adapter that can be asked for, sorted by name."""
        with self._lock:
            ready = [a.current.info for a in self._adapters.values() if a.current.error is None]
        return sorted(ready, key=lambda version: version.name)

    def records(self) -> Iterator[AdapterRecord]:
        """What is known of every name, sorted, whatever its state. The books may change in between: to hold
        them for many thousands would hold up every request."""
        with self._lock:
            names = {*self._adapters, *self._claims, *self._failed, *(a.row.name for a in self._draining)}
        for name in sorted(names):
            with self._lock:
                record = self._record(name)
            if record is not None:
                yield record

    def holds(self, digest: str) -> bool:
        """Whether any version or lease still needs this content."""
        return self._store.holds(digest)

    def pinned(self) -> list[AdapterVersion]:
        """The versions that were asked to stay in accelerator memory."""
        with self._lock:
            return [a.current.info for a in self._adapters.values() if a.row.pinned and not a.current.error]

    # use

    def served(self, version: AdapterVersion, tokens: int) -> None:
        """Count one request and the tokens it generated; written to disk every few seconds and at close."""
        with self._lock:
            adapter = self._adapters.get(version.name)
            books = adapter.versions.get(version.number) if adapter else None
            if books is not None and books.info == version:  # else deleted meanwhile
                self._counters.count(books, tokens)

    def flush(self) -> None:
        """Write the counters that changed, now."""
        self._counters.flush()

    def loaded(self, digest: str, milliseconds: float) -> None:
        """Note how long a load that was asked for took."""
        with self._lock:
            if self._store.holds(digest):
                self._load_ms[digest] = milliseconds

    # writing

    def publication(self, *, create: bool, replace: bool, expected_bytes: int = 0) -> Publication:
        """Begin a write that may create a name, give a known one a new version, or both."""
        return Publication(self, self._store.staging(expected_bytes), create=create, replace=replace)

    def look(self, name: str, *, create: bool, replace: bool) -> object:
        """What a write of `name` would take the place of, if anything. See Publication.begin."""
        check_name(name)
        if name == self._base_name:
            raise InvalidRequest(f"`{name}` is the name of the base model.", param="name")
        with self._lock:
            return self._look(name, create=create, replace=replace)

    def claim(self, name: str, *, create: bool, replace: bool, seen: object) -> None:
        """Keep other writers off `name` until `unclaim`, if a look at it shows what was `seen`."""
        with self._lock:
            if self._look(name, create=create, replace=replace) is not seen:
                raise Conflict(f"The adapter `{name}` was changed by another call meanwhile.", param="name")
            if name in self._claims:
                raise Conflict(f"The adapter `{name}` is being written by another call.", param="name")
            self._claims.add(name)

    def _look(self, name: str, *, create: bool, replace: bool) -> VersionBooks | None:
        adapter = self._adapters.get(name)
        if adapter is not None and not replace:
            raise Conflict(f"The adapter `{name}` exists already.", param="name")
        if adapter is None and not create:
            raise _unknown(name)
        return adapter.current if adapter else None

    def unclaim(self, name: str) -> None:
        with self._lock:
            self._claims.discard(name)

    def judge(self, folder: Path) -> LoraAdapter:
        """Check config and tensor header against base model and engine; see `peft.format.judge`. One at a
        time: several threads of Python's at once would keep the event loop from its turn."""
        with self._judging:
            return judge(folder, self._targets, self._limits)

    def commit(
        self,
        name: str,
        judged: LoraAdapter,
        staging: Staging,
        digest: str,
        *,
        provenance: str,
        description: str | None,
        stamp: str | None,
    ) -> Published:
        """The last steps of a publication by the holder of the name's claim: files, then row, then memory."""
        with self._lock:
            old = self._adapters.get(name)
        now = time.time()
        row = old.row if old else AdapterRow(name, 0, None, "", False, now)
        row = dataclasses.replace(
            row,
            folder_stamp=stamp or row.folder_stamp,
            description=row.description if description is None else description,
        )
        if old and old.current.info.digest == digest and old.current.error is None:
            if row != old.row:
                self._catalogue.update(name, folder_stamp=row.folder_stamp, description=row.description)
                self._set_row(old, folder_stamp=row.folder_stamp, description=row.description)
            return Published(old.current.info, "unchanged")
        number = max(old.versions, default=0) + 1 if old else 1
        info = AdapterVersion(
            name=name, number=number, digest=digest, path=self._store.folder(digest),
            rank=judged.rank, alpha=judged.alpha, targets=judged.target_modules,
            parameters=judged.parameters, bytes=judged.weight_bytes, source=provenance, created_at=now,
        )  # fmt: skip
        version = VersionBooks(info)
        row = dataclasses.replace(row, current=number)
        beyond = list(old.versions.values())[: 1 - KEPT_VERSIONS] if old else []
        mend = self.damage.of(digest)
        self._store.add(staging, digest, mend=bool(mend))
        try:
            self._catalogue.publish(row, version.row(), [v.info.number for v in beyond])
        except BaseException:
            self._store.drop(digest)
            raise
        with self._lock:
            adapter = self._adapters.setdefault(name, AdapterBooks(row))
            adapter.versions[number] = version
            adapter.row = dataclasses.replace(row, pinned=adapter.row.pinned)
            self._failed.pop(name, None)
            for each in mend:
                each.error = None
        retired = self._retire(adapter, beyond)
        return Published(info, "replaced" if old else "created", retired, adapter.row.pinned)

    def delete(self, name: str) -> tuple[Retired, ...]:
        """Forget a name: new requests do not find it, running ones finish, then its files go.

        Raises ModelNotFound (param `name`), Conflict while it is being written.
        """
        with self._lock:
            if name not in self._adapters and self._failed.pop(name, None) is not None:
                return ()
        seen = self.look(name, create=False, replace=True)
        self.claim(name, create=False, replace=True, seen=seen)
        try:
            self._catalogue.delete(name)
            with self._lock:
                adapter = self._adapters.pop(name)
                self._draining.append(adapter)
            return self._retire(adapter, adapter.versions.values())
        finally:
            self.unclaim(name)

    def set_pinned(self, name: str, pinned: bool) -> None:
        """Remember that a name is to stay in accelerator memory. Raises ModelNotFound."""
        with self._lock:
            adapter = self._adapters.get(name)
        if adapter is None:
            raise _unknown(name)
        if adapter.row.pinned != pinned:
            self._catalogue.update(name, pinned=pinned)
            self._set_row(adapter, pinned=pinned)

    def folder_stamps(self) -> dict[str, str]:
        """Names that came from the adapters folder -> the stamp of what was read then, '' if it is to be
        read again. A name that was only ever uploaded is not among them."""
        with self._lock:
            adapters = [a for a in self._adapters.values() if a.row.folder_stamp is not None]
            return {a.row.name: "" if a.current.error else a.row.folder_stamp or "" for a in adapters}

    def failed(self, name: str, reason: str) -> None:
        """List a name that could not be registered, with the reason; one that serves already goes on."""
        with self._lock:
            if name not in self._adapters:
                self._failed[name] = reason

    # books

    def _record(self, name: str) -> AdapterRecord | None:
        if adapter := self._adapters.get(name):
            return adapter.record("failed" if adapter.current.error else "ready", self._load_ms)
        if name in self._claims:
            return AdapterRecord(name, "validating", None, None)
        if name in self._failed:
            return AdapterRecord(name, "failed", self._failed[name], None)
        last = next((a for a in reversed(self._draining) if a.row.name == name), None)
        return last.record("draining", self._load_ms) if last else None

    def _restore(self) -> None:
        """At start: rows to books, a hold for each version, and the judgement again if the base changed."""
        fingerprint = hashlib.sha256(msgspec.json.encode(self._targets)).hexdigest()
        known = self._catalogue.fact("targets")
        agreed = True
        for row, versions in self._catalogue.load():
            adapter = self._adapters[row.name] = AdapterBooks(row)
            for version_row in versions:
                version = VersionBooks.of_row(version_row, self._store.folder(version_row.digest))
                adapter.versions[version_row.number] = version
                version.stored = self._store.hold(version_row.digest)
                if not version.stored:
                    version.error = "its files are missing from the data folder"
                elif known != fingerprint:
                    try:
                        self.judge(version.info.path)
                    except ChorusError as error:
                        agreed = False
                        version.error = f"does not fit the base model any more: {error.message}"
                if version.error:
                    _log.error("adapter %s@%d %s", row.name, version_row.number, version.error)
        if agreed and known != fingerprint:
            self._catalogue.set_fact("targets", fingerprint)
        self._store.sweep()

    def _retire(self, adapter: AdapterBooks, versions: Iterable[VersionBooks]) -> tuple[Retired, ...]:
        """No name leads to these versions any more; those that nobody uses go now."""
        with self._lock:
            versions = list(versions)
            retired = tuple(version.retire() for version in versions)
            if adapter not in self._draining:
                for version in versions:
                    del adapter.versions[version.info.number]
            unused = [version for version in versions if not version.leases]
        for version in unused:
            self._free(version)
        return retired

    def _give_back(self, version: VersionBooks) -> None:
        with self._lock:
            version.leases -= 1
            last = not version.leases and not version.listed
        if last:
            self._free(version)

    def _free(self, version: VersionBooks) -> None:
        def gone() -> None:
            with self._lock:
                version.freed = True
                if not self._store.holds(version.info.digest):
                    self._load_ms.pop(version.info.digest, None)
                self._draining = [a for a in self._draining if not all(v.freed for v in a.versions.values())]
            version.gone.set_result(None)

        if version.stored:
            self._store.drop(version.info.digest, then=gone)
        else:
            gone()

    def _set_row(self, adapter: AdapterBooks, **fields: object) -> None:
        with self._lock:
            adapter.row = dataclasses.replace(adapter.row, **fields)  # type: ignore[arg-type]  # its own columns


def _unknown(name: str) -> ModelNotFound:
    """ModelNotFound of the management routes, where the field is called `name`."""
    error = ModelNotFound(name)
    error.param = "name"
    return error
