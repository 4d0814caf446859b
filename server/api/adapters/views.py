"""Adapters as JSON. Times are seconds since 1970; `bytes` are of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NotRequired, Self, TypedDict

from server.messages import AdapterResult, EngineStats, Location
from server.registry.records import AdapterRecord, AdapterState, AdapterVersion, VersionRecord


class VersionView(TypedDict):
    """What a version is."""

    name: str
    version: int
    digest: str
    rank: int
    alpha: float
    targets: list[str]
    parameters: int
    bytes: int
    source: str
    created_at: float


class PublishedView(VersionView):
    """A version that an upload or a registration led to."""

    object: Literal["adapter.version"]
    state: Literal["ready"]


class VersionRecordView(VersionView):
    """A version, where it is, and what it has served so far. `reason` says why it cannot be used."""

    residency: Location
    last_load_ms: float | None
    requests: int
    tokens: int
    last_used: float | None
    reason: str | None


class AdapterView(TypedDict):
    """A name: its current version (once there is one), its state, where it is, and all its versions.

    `share` is the part of the base model's parameters. `versions`: oldest first.
    """

    object: Literal["adapter"]
    name: str
    state: AdapterState
    reason: str | None
    description: str
    pinned: bool
    created_at: float | None
    requests: int
    tokens: int
    last_used: float | None
    versions: list[VersionRecordView]
    version: NotRequired[int]
    digest: NotRequired[str]
    rank: NotRequired[int]
    alpha: NotRequired[float]
    targets: NotRequired[list[str]]
    parameters: NotRequired[int]
    bytes: NotRequired[int]
    source: NotRequired[str]
    share: NotRequired[float | None]
    residency: NotRequired[Location]
    last_load_ms: NotRequired[float | None]


class AdapterListView(TypedDict):
    object: Literal["list"]
    data: list[AdapterView]


class DeletedView(TypedDict):
    object: Literal["adapter"]
    name: str
    state: Literal["deleted", "draining"]


class LoadedView(TypedDict):
    """Where a version is after a load or an unload, and how long the copy took."""

    object: Literal["adapter"]
    name: str
    version: int
    digest: str
    residency: Location
    milliseconds: float


@dataclass(frozen=True)
class Locations:
    """Where the engine's last heartbeat says that weights are. Without an engine all are on disk only."""

    arena: frozenset[str] = frozenset()  # digests
    host: frozenset[str] = frozenset()

    @classmethod
    def of(cls, stats: EngineStats | None) -> Self:
        return cls(frozenset(stats.resident), frozenset(stats.on_host)) if stats else cls()

    def residency(self, digest: str) -> Location:
        return "arena" if digest in self.arena else "host" if digest in self.host else "disk"


def version_view(version: AdapterVersion) -> VersionView:
    return {
        "name": version.name,
        "version": version.number,
        "digest": version.digest,
        "rank": version.rank,
        "alpha": version.alpha,
        "targets": list(version.targets),
        "parameters": version.parameters,
        "bytes": version.bytes,
        "source": version.source,
        "created_at": version.created_at,
    }


def published_view(version: AdapterVersion) -> PublishedView:
    return {**version_view(version), "object": "adapter.version", "state": "ready"}


def adapter_view(record: AdapterRecord, base_parameters: int, locations: Locations) -> AdapterView:
    view: AdapterView = {
        "object": "adapter",
        "name": record.name,
        "state": record.state,
        "reason": record.reason,
        "description": record.description,
        "pinned": record.pinned,
        "created_at": record.created_at,
        "requests": record.requests,
        "tokens": record.tokens,
        "last_used": record.last_used,
        "versions": [_version_record_view(version, locations) for version in record.versions],
    }
    current = next((v for v in record.versions if v.version == record.current), None)
    if current is None:
        return view
    version = current.version
    return {
        **version_view(version),
        **view,
        "share": version.parameters / base_parameters if base_parameters else None,
        "residency": locations.residency(version.digest),
        "last_load_ms": current.load_ms,
    }


def loaded_view(version: AdapterVersion, result: AdapterResult) -> LoadedView:
    return {
        "object": "adapter",
        "name": version.name,
        "version": version.number,
        "digest": version.digest,
        "residency": result.residency,
        "milliseconds": result.milliseconds,
    }


def _version_record_view(record: VersionRecord, locations: Locations) -> VersionRecordView:
    return {
        **version_view(record.version),
        "residency": locations.residency(record.version.digest),
        "last_load_ms": record.load_ms,
        "requests": record.requests,
        "tokens": record.tokens,
        "last_used": record.last_used,
        "reason": record.error,
    }
