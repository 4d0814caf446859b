"""One write of one name, from its beginning to the moment it is visible."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, Self

from server.errors import InvalidRequest
from server.peft.format import LoraAdapter, check_finite
from server.registry.catalogue import AdapterId
from server.registry.records import Published
from server.registry.store import Staging, full_disk_is_refused

_MAX_DESCRIPTION = 1000  # characters


class Publisher(Protocol):
    """What a publication asks of the registry."""

    def look(self, adapter: AdapterId, *, create: bool, replace: bool) -> object: ...

    def claim(self, adapter: AdapterId, *, create: bool, replace: bool, seen: object) -> None: ...

    def unclaim(self, adapter: AdapterId) -> None: ...

    def judge(self, folder: Path) -> LoraAdapter: ...

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
    ) -> Published: ...


class Publication:
    """One write of one name: `begin` with it, fill `staging`, `publish`. Close it in any case.

    Until `publish` returns nobody sees anything of it; after `close` nothing of a failed one is left. The
    name is free for others while staging is filled, however long that takes: the first who publishes wins.
    """

    def __init__(
        self, publisher: Publisher, staging: Staging, tenant: str, *, create: bool, replace: bool
    ) -> None:
        self.staging = staging
        self._publisher = publisher
        self._tenant = tenant
        self._create = create
        self._replace = replace
        self._name: str | None = None
        self._seen: object = None
        self._claimed = False

    @property
    def name(self) -> str | None:
        """The name it began with, if it did."""
        return self._name

    def begin(self, name: str) -> None:
        """Refuse at once what would be refused at the end. Raises InvalidRequest for a bad name, Conflict for
        one that is taken."""
        self._seen = self._publisher.look(self._id(name), create=self._create, replace=self._replace)
        self._name = name

    def publish(
        self, provenance: str, *, description: str | None = None, stamp: str | None = None
    ) -> Published:
        """Judge what is staged, store it and make it the name's current version, kept with its `provenance`.

        Raises InvalidAdapter, TooLarge, UnsupportedMedia, InsufficientStorage, InvalidRequest, and Conflict
        when somebody else writes the name, or has written or deleted it since `begin`.
        """
        if self._name is None:
            raise InvalidRequest("`name` is missing.", param="name")
        if description is not None and len(description) > _MAX_DESCRIPTION:
            raise InvalidRequest(
                f"`description` is longer than {_MAX_DESCRIPTION} characters.", param="description"
            )
        name = self._id(self._name)
        self._publisher.claim(name, create=self._create, replace=self._replace, seen=self._seen)
        self._claimed = True
        content = self.staging.content
        adapter = self._publisher.judge(content)
        # Hash and sync while the weights are read.
        with full_disk_is_refused(), ThreadPoolExecutor(1) as beside:
            sealing = beside.submit(self.staging.seal)
            check_finite(content, adapter)
            digest = sealing.result()
        return self._publisher.commit(
            name,
            adapter,
            self.staging,
            digest,
            provenance=provenance,
            description=description,
            stamp=stamp,
        )

    def close(self) -> None:
        """Idempotent."""
        claimed, self._claimed = self._claimed, False
        if claimed and self._name is not None:
            self._publisher.unclaim(self._id(self._name))
        self.staging.discard()

    def _id(self, name: str) -> AdapterId:
        return AdapterId(self._tenant, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
