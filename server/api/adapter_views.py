"""Adapters as JSON."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from server.engine.messages import Residency
from server.registry.records import AdapterRecord, AdapterVersion, VersionRecord


def version_view(version: AdapterVersion) -> dict[str, Any]:
    """What a version is. Times are seconds since 1970, `bytes` are of the weights."""
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


def adapter_view(record: AdapterRecord, base_parameters: int, resident: Collection[str]) -> dict[str, Any]:
    """A name: its current version, its state, where it is, and all its versions, oldest first.

    `share` is the part of the base model's parameters; `resident` the digests in the arena.
    """
    view: dict[str, Any] = {
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
        "versions": [_version_record_view(version, resident) for version in record.versions],
    }
    current = next((v for v in record.versions if v.version == record.current), None)
    if current is not None:
        view |= {key: value for key, value in version_view(current.version).items() if key not in view}
        view["share"] = current.version.parameters / base_parameters if base_parameters else None
        view["residency"] = residency_of(current, resident)
        view["last_load_ms"] = current.load.milliseconds if current.load else None
    return view


def residency_of(record: VersionRecord, resident: Collection[str]) -> Residency:
    """The arena by the engine's last heartbeat; else by its last answer, for what left the arena since."""
    if record.version.digest in resident:
        return "arena"
    if record.load is None or record.load.residency == "disk":
        return "disk"
    return "host"


def _version_record_view(record: VersionRecord, resident: Collection[str]) -> dict[str, Any]:
    return version_view(record.version) | {
        "residency": residency_of(record, resident),
        "last_load_ms": record.load.milliseconds if record.load else None,
        "requests": record.requests,
        "tokens": record.tokens,
        "last_used": record.last_used,
        "reason": record.error,
    }
