"""What pinned adapter versions take of the arena, and how much they may."""

from __future__ import annotations

from collections.abc import Iterable

from server.lora.version import Version
from server.messages import ErrorCode
from server.scheduling.adapter_gate import Acquire, AcquireStatus


class Pins:
    """Pinned versions, by digest. They may hold `share` of `total` bytes: the rest is for all others."""

    def __init__(self, share: float, total: int) -> None:
        self._total = total
        self._most = int(share * total)
        self._sizes: dict[str, int] = {}
        self._held = 0

    @property
    def digests(self) -> frozenset[str]:
        return frozenset(self._sizes)

    def add(self, version: Version, nbytes: int) -> None:
        if version.digest not in self._sizes:
            self._sizes[version.digest] = nbytes
            self._held += nbytes
        version.pinned = True

    def remove(self, version: Version) -> None:
        self._held -= self._sizes.pop(version.digest, 0)
        version.pinned = False

    def over_share(self, version: Version, nbytes: int) -> Acquire | None:
        """Why a version of that size cannot be pinned; None where it can or is."""
        if version.pinned or self._held + nbytes <= self._most:
            return None
        message = (
            f"Pinned adapters may take {self._most} bytes of accelerator memory; of these too few are left "
            f"for the {nbytes} of this one."
        )
        return Acquire(AcquireStatus.FAILED, ErrorCode.PIN_LIMIT, message)

    def in_the_way(self, versions: Iterable[Version], nbytes: int) -> Acquire | None:
        """Why a mix of that size will not get room however long it waits; None where it may."""
        others = self._held - sum(self._sizes.get(version.digest, 0) for version in versions)
        if nbytes <= self._total - others:
            return None
        message = "Pinned adapters leave too little accelerator memory for this request."
        return Acquire(AcquireStatus.FAILED, ErrorCode.OUT_OF_MEMORY, message)
