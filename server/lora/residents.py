"""The adapter versions in the arena, and which of them make room for others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from server.lora.arena import Arena, Extent
from server.lora.layout import Layout
from server.lora.version import Version


class Residents:
    """Versions with a slot, least recently used first. `left` is called with each one that was evicted, and
    says where it is now."""

    def __init__(self, arena: Arena, left: Callable[[Version], None]) -> None:
        self.loads = 0  # versions that came in so far
        self.evictions = 0  # that made room for others
        self._arena = arena
        self._left = left
        self._by_age: OrderedDict[str, Version] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._by_age

    def __iter__(self) -> Iterator[Version]:
        return iter(self._by_age.values())

    def touch(self, digest: str) -> None:
        """It was used just now. Raises KeyError when it is not here."""
        self._by_age.move_to_end(digest)

    def enter(self, version: Version, layout: Layout) -> None:
        """Its image lies in its extent."""
        assert version.extent is not None
        version.enter(self._arena.commit(version.extent, layout))
        self._by_age[version.digest] = version
        self.loads += 1

    def evict(self, version: Version) -> None:
        """Take it out of the arena. Raises KeyError when it is not here."""
        del self._by_age[version.digest]
        assert version.slot is not None
        self._arena.release(version.slot)
        self._left(version)

    def reserve(self, needs: Sequence[int], may_leave: Callable[[Version], bool]) -> list[Extent] | None:
        """Extents of `needs` bytes, all or None; evicts as little of those that may leave as will do, least
        recently used first."""
        idle = [version for version in self if may_leave(version)]
        if sum(needs) > self._arena.bytes_free + sum(each.extent.nbytes for each in idle if each.extent):
            return None
        extents: list[Extent] = []
        for nbytes in needs:
            extent = self._make_room(nbytes, idle)
            if extent is None:
                for other in extents:
                    self._arena.abandon(other)
                return None
            extents.append(extent)
        return extents

    def _make_room(self, nbytes: int, idle: list[Version]) -> Extent | None:
        """Those evicted are taken out of `idle`."""
        while True:
            extent = self._arena.reserve(nbytes)
            if extent is None and self._arena.bytes_free >= nbytes and self._arena.compact():
                extent = self._arena.reserve(nbytes)
            if extent is not None or not idle:
                return extent
            self.evictions += 1
            self.evict(idle.pop(0))
