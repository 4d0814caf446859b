from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.lora.arena import Extent
from server.lora.version import Place, Version

DISK, READING, HOST, COPYING, RESIDENT, LEAVING = Place

EVENTS: dict[str, Callable[[Version], None]] = {
    "read": lambda version: version.read(),
    "copy": lambda version: version.copy(Extent(64, 128)),
    "enter": lambda version: version.enter(3),
    "to disk": lambda version: version.settle(DISK),
    "to host": lambda version: version.settle(HOST),
    "unload": lambda version: version.unload(forget=False),
    "forget": lambda version: version.unload(forget=True),
    "stay": lambda version: version.stay(),
}

# Where each event leads from each place; what is not here is impossible. An unload of what is not in the
# arena yet is carried out later.
LATER = ("unload", "forget", "stay")
NEXT = {
    DISK: {"read": READING, "copy": COPYING, **dict.fromkeys(LATER, DISK)},
    READING: {"to disk": DISK, "to host": HOST, **dict.fromkeys(LATER, READING)},
    HOST: {"read": READING, "copy": COPYING, "to disk": DISK, **dict.fromkeys(LATER, HOST)},
    COPYING: {"enter": RESIDENT, "to disk": DISK, "to host": HOST, **dict.fromkeys(LATER, COPYING)},
    RESIDENT: {"to disk": DISK, "to host": HOST, "unload": LEAVING, "forget": LEAVING, "stay": RESIDENT},
    LEAVING: {"to disk": DISK, "to host": HOST, "unload": LEAVING, "forget": LEAVING, "stay": RESIDENT},
}


@given(start=st.sampled_from([DISK, HOST]), events=st.lists(st.sampled_from(sorted(EVENTS)), max_size=40))
def test_it_moves_as_the_table_says_and_in_no_other_way(start: Place, events: list[str]) -> None:
    version, goes = Version("digest", "/path", start), None
    for event in events:
        before = version.place
        if event in NEXT[before]:
            EVENTS[event](version)
            if event in ("unload", "forget"):
                goes = DISK if event == "forget" or goes is DISK else HOST
            elif event == "stay":
                goes = None
            lands_unloaded = event == "enter" and goes is not None
            assert version.place is (LEAVING if lands_unloaded else NEXT[before][event])
        else:
            with pytest.raises(ValueError, match="adapter version"):
                EVENTS[event](version)
            assert version.place is before
        assert version.goes is goes
        assert version.in_arena == (version.slot is not None) == (version.place in (RESIDENT, LEAVING))
        assert (version.extent is not None) == (version.place in (COPYING, RESIDENT, LEAVING))
        assert version.busy == (version.place in (READING, COPYING))
        if version.in_arena:
            assert (version.place is LEAVING) == (goes is not None)


@pytest.mark.parametrize("place", [READING, COPYING, RESIDENT, LEAVING])
def test_it_settles_on_disk_or_on_the_host_only(place: Place) -> None:
    version = Version("digest", "/path", DISK)
    version.read()
    with pytest.raises(ValueError, match="cannot go"):
        version.settle(place)
