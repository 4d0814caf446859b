"""What the audit log says of a change of adapters."""

from __future__ import annotations

from collections.abc import Iterable

from server.registry.records import Published
from server.registry.sources.folders import FOLDER_SOURCE, FolderOutcome
from server.telemetry.audit import AuditLog


def change_of(published: Published) -> dict[str, object]:
    """The facts of one that was written."""
    version = published.version
    known = {"name": version.name, "version": version.number, "digest": version.digest}
    return {**known, "source": version.source, "change": published.outcome}


def audit_folders(audit_log: AuditLog, outcomes: Iterable[FolderOutcome]) -> None:
    """A record for each folder of `--adapters` that changed something at the start, or was refused."""
    for each in outcomes:
        facts: dict[str, object] = {"name": each.name, "source": FOLDER_SOURCE + each.name}
        if each.gone:
            audit_log.record("adapter.delete", **facts, outcome="completed")
        elif each.error is not None:
            audit_log.record("adapter.create", **facts, outcome="rejected", reason=each.error)
        elif each.published is not None and each.published.outcome != "unchanged":
            event = "adapter.replace" if each.published.outcome == "replaced" else "adapter.create"
            audit_log.record(event, **facts | change_of(each.published), outcome="completed")
