"""The adapter versions in the arena, and which of them make room for others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from server.lora.arena import Arena, Extent
from server.lora.layout import Layout
from server.scheduling.adapter_gate import Acquire


@dataclass(eq=False)
class Version:
    """What is known of one adapter version that is in the arena, on its way, or asked for."""

    digest: str
    path: str
    busy: bool = False  # a worker judges, reads or copies it
    extent: Extent | None = None  # reserved; being filled, or resident when there is a slot
    slot: int | None = None
    uses: int = 0  # by sequences
    pinned: bool = False
    leaving: bool = False  # leaves the arena when nobody uses it
    forget: bool = False  # and the host as well
    failure: Acquire | None = None  # of the last load, until those who wait were told
    spent_ms: float = 0.0  # of work towards the next landing
    load_ms: float = 0.0  # work that the last landing in the arena took

    @property
    def blank(self) -> bool:
        """Whether there is nothing to know of it but whether its image is on the host."""
        return not (self.busy or self.extent or self.uses or self.pinned or self.failure)


class Residents:
    """Versions with a slot, least recently used first. `left` is called with each one that was evicted."""

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
        version.slot = self._arena.commit(version.extent, layout)
        self._by_age[version.digest] = version
        self.loads += 1

    def evict(self, version: Version) -> None:
        """Take it out of the arena. Raises KeyError when it is not here."""
        del self._by_age[version.digest]
        assert version.slot is not None
        self._arena.release(version.slot)
        version.slot = version.extent = None
        self._left(version)

    def reserve(
        self, versions: Sequence[Version], needs: Sequence[int], may_leave: Callable[[Version], bool]
    ) -> bool:
        """Extents of `needs` bytes for versions without one, for all or for none of them; evicts as little of
        those that may leave as will do, least recently used first."""
        idle = [version for version in self if may_leave(version)]
        if sum(needs) > self._arena.bytes_free + sum(each.extent.nbytes for each in idle if each.extent):
            return False
        for version, nbytes in zip(versions, needs, strict=True):
            version.extent = self._make_room(nbytes, idle)
            if version.extent is None:
                for other in versions:
                    self.abandon(other)
                return False
        return True

    def abandon(self, version: Version) -> None:
        """It will not come in: give back the extent that was reserved for it, if there is one."""
        if version.extent is not None:
            self._arena.abandon(version.extent)
            version.extent = None

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
