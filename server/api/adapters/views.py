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
    """A version, where it is, and what it has served so far. `reason` says why it cannot be used.

    What is not required is its owner's to see: of a shared adapter no other tenant is told.
    """

    reason: str | None
    residency: NotRequired[Location]
    last_load_ms: NotRequired[float | None]
    last_load_error: NotRequired[str | None]
    requests: NotRequired[int]
    tokens: NotRequired[int]
    last_used: NotRequired[float | None]


class AdapterView(TypedDict):
    """A name: its current version (once there is one), its state, where it is, and all its versions.

    `share` is the part of the base model's parameters. `versions`: oldest first. `shared`: every tenant may
    use it; others than its own see neither who that is nor what he does with it.
    """

    object: Literal["adapter"]
    name: str
    state: AdapterState
    reason: str | None
    description: str
    shared: bool
    created_at: float | None
    versions: list[VersionRecordView]
    tenant: NotRequired[str]
    pinned: NotRequired[bool]
    requests: NotRequired[int]
    tokens: NotRequired[int]
    last_used: NotRequired[float | None]
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
    last_load_error: NotRequired[str | None]


class AdapterListView(TypedDict):
    object: Literal["list"]
    data: list[AdapterView]
    first_id: str | None
    last_id: str | None
    has_more: bool


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


SHARED_SOURCE = "shared"  # the provenance that other tenants see


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


def adapter_view(
    record: AdapterRecord, tenant: str, base_parameters: int, locations: Locations
) -> AdapterView:
    """As `tenant` may see it."""
    own = record.tenant == tenant
    view: AdapterView = {
        "object": "adapter",
        "name": record.name,
        "state": record.state,
        "reason": record.reason,
        "description": record.description,
        "shared": record.shared,
        "created_at": record.created_at,
        "versions": [_version_record_view(version, own, locations) for version in record.versions],
    }
    if own:
        view |= {
            "tenant": record.tenant,
            "pinned": record.pinned,
            "requests": record.requests,
            "tokens": record.tokens,
            "last_used": record.last_used,
        }
    current = next((v for v in record.versions if v.version == record.current), None)
    if current is None:
        return view
    version = current.version
    view = {
        **_version_seen(version, own),
        **view,
        "share": version.parameters / base_parameters if base_parameters else None,
    }
    if own:
        view |= {
            "residency": locations.residency(version.digest),
            "last_load_ms": current.load.milliseconds,
            "last_load_error": current.load.error,
        }
    return view


def loaded_view(version: AdapterVersion, result: AdapterResult) -> LoadedView:
    return {
        "object": "adapter",
        "name": version.name,
        "version": version.number,
        "digest": version.digest,
        "residency": result.residency,
        "milliseconds": result.milliseconds,
    }


def _version_record_view(record: VersionRecord, own: bool, locations: Locations) -> VersionRecordView:
    seen = _version_seen(record.version, own)
    view: VersionRecordView = {**seen, "reason": record.error}  # type: ignore[typeddict-item]  # no more is in it
    if own:
        view |= {
            "residency": locations.residency(record.version.digest),
            "last_load_ms": record.load.milliseconds,
            "last_load_error": record.load.error,
            "requests": record.requests,
            "tokens": record.tokens,
            "last_used": record.last_used,
        }
    return view


def _version_seen(version: AdapterVersion, own: bool) -> VersionView:
    """Others are not told where it came from, which may be a path."""
    view = version_view(version)
    return view if own else {**view, "source": SHARED_SOURCE}
