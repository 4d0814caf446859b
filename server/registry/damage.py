"""Versions whose stored files turned out not to be what was stored."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from server.errors import DamagedAdapter
from server.peft.digest import check_digest
from server.registry.records import AdapterBooks, AdapterVersion, VersionBooks

_REASON = "its stored files are damaged; upload it again"

_log = logging.getLogger(__name__)


class Damage:
    """Finds and marks them in the registry's books, which `lock` guards."""

    def __init__(self, adapters: Mapping[str, AdapterBooks], lock: threading.Lock) -> None:
        self._adapters, self._lock = adapters, lock

    def recheck(self, version: AdapterVersion) -> None:
        """Read a version's files again: damaged ones are not served, under any name, until they are uploaded
        again. Belongs in a thread."""
        try:
            check_digest(version.path, version.digest)
        except (DamagedAdapter, OSError) as error:
            _log.error("adapter %s@%d is damaged: %s", version.name, version.number, error)
            with self._lock:
                for books in self._holding(version.digest):
                    books.error = _REASON

    def of(self, digest: str) -> list[VersionBooks]:
        """The versions of this content that are marked."""
        with self._lock:
            return [books for books in self._holding(digest) if books.error == _REASON]

    def _holding(self, digest: str) -> list[VersionBooks]:
        versions = (books for adapter in self._adapters.values() for books in adapter.versions.values())
        return [books for books in versions if books.info.digest == digest]
