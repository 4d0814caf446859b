"""One adapter version: where it is, and how it gets from there to another place."""

from __future__ import annotations

import enum

from server.lora.arena import Extent


class Place(enum.Enum):
    """Where a version's weights are, or are on their way to."""

    DISK = "disk"
    READING = "reading"  # a worker judges its files, or reads them to the host
    HOST = "host"  # its whole image, and nothing of it in the arena
    COPYING = "copying"  # a worker fills its extent of the arena, from the host or from disk
    RESIDENT = "resident"
    LEAVING = "leaving"  # resident until nobody uses or awaits it


_MAY_LAND_ON_HOST = (Place.READING, Place.COPYING, Place.RESIDENT, Place.LEAVING)
_SETTLES_FROM = {Place.DISK: (*_MAY_LAND_ON_HOST, Place.HOST), Place.HOST: _MAY_LAND_ON_HOST}


class Version:
    """What is known of one adapter version that is in the arena, on its way, or awaited.

    `place` is where it is; it holds an `extent` of the arena from COPYING on and a `slot` from RESIDENT on.
    `goes`: where an unload sends it, HOST or DISK, when nobody uses or awaits it and no worker is at it;
    None: it stays. Each method that moves it raises ValueError where it cannot go from its place.
    """

    def __init__(self, digest: str, path: str, place: Place, content: str = "") -> None:
        self.digest = digest
        self.path = path
        self.content = content  # as in AdapterRef
        self._place = place
        self.extent: Extent | None = None
        self.slot: int | None = None
        self.goes: Place | None = None
        self.uses = 0  # by sequences
        self.pinned = False
        self.spent_ms = 0.0  # work towards the next landing in the arena
        self.load_ms = 0.0  # work that the last landing took

    @property
    def place(self) -> Place:
        return self._place

    @property
    def busy(self) -> bool:
        """Whether a worker is at it."""
        return self.place in (Place.READING, Place.COPYING)

    @property
    def in_arena(self) -> bool:
        return self.slot is not None

    def read(self) -> None:
        """A worker begins to judge its files, or to read them to the host."""
        self._move(Place.READING, Place.DISK, Place.HOST)

    def copy(self, extent: Extent) -> None:
        """A worker begins to fill its extent of the arena."""
        self._move(Place.COPYING, Place.DISK, Place.HOST)
        self.extent = extent

    def enter(self, slot: int) -> None:
        """Its image lies in its extent."""
        self._move(Place.RESIDENT if self.goes is None else Place.LEAVING, Place.COPYING)
        self.slot = slot

    def settle(self, place: Place) -> None:
        """It is on DISK or on the HOST, with nothing of it in the arena and no worker at it."""
        self._move(place, *_SETTLES_FROM.get(place, ()))
        self.extent = self.slot = None

    def unload(self, forget: bool) -> None:
        """It goes to the host or, to `forget` it, to disk."""
        self.goes = Place.DISK if forget or self.goes is Place.DISK else Place.HOST
        if self.place is Place.RESIDENT:
            self._place = Place.LEAVING

    def stay(self) -> None:
        """Whatever unload there was is done, or called off."""
        self.goes = None
        if self.place is Place.LEAVING:
            self._place = Place.RESIDENT

    def _move(self, place: Place, *origins: Place) -> None:
        if self.place not in origins:
            raise ValueError(f"an adapter version cannot go from {self.place.value} to {place.value}")
        self._place = place
