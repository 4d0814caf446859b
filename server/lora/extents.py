"""Room in one address range, taken and given back in pieces of any size."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Container


class ExtentAllocator:
    """Best-fit over free extents of one address range; pure arithmetic, units are the caller's.

    Always: `free` + sum of taken sizes = `size`, no two extents overlap, no two free extents touch.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = size
        self._holes = [(0, size)] if size else []  # (start, size), by start
        self._taken: dict[int, int] = {}  # start -> size

    @property
    def largest_hole(self) -> int:
        return max((size for _, size in self._holes), default=0)

    @property
    def taken(self) -> list[tuple[int, int]]:
        """(start, size) of every extent that is taken, by start."""
        return sorted(self._taken.items())

    def take(self, size: int) -> int | None:
        """The start of a new extent in the tightest hole that fits, or None."""
        if size <= 0:
            raise ValueError(f"an extent of {size} cannot be taken")
        hole = min((h for h in self._holes if h[1] >= size), key=lambda h: h[1], default=None)
        if hole is None:
            return None
        self._cut(hole, size)
        return hole[0]

    def give(self, start: int) -> None:
        """Give an extent back. Raises KeyError when none is taken at `start`."""
        size = self._taken.pop(start)
        self.free += size
        at = bisect_left(self._holes, (start, 0))
        if at < len(self._holes) and self._holes[at][0] == start + size:
            size += self._holes.pop(at)[1]
        if at and sum(self._holes[at - 1]) == start:
            start, before = self._holes.pop(at - 1)
            size += before
        insort(self._holes, (start, size))

    def compact(self, fixed: Container[int] = ()) -> list[tuple[int, int, int]]:
        """Slide extents towards 0; those whose start is in `fixed` stay where they are.

        Returns the moves (from, to, size) to be made in this order: to < from, and no move writes over an
        extent that has not moved yet.
        """
        moves, taken, end, holes = [], {}, 0, []
        for start, size in self.taken:
            to = start if start in fixed else end
            if to != start:
                moves.append((start, to, size))
            if to > end:
                holes.append((end, to - end))
            taken[to] = size
            end = to + size
        if end < self.size:
            holes.append((end, self.size - end))
        self._taken, self._holes = taken, holes
        return moves

    def _cut(self, hole: tuple[int, int], size: int) -> None:
        at = bisect_left(self._holes, hole)
        if hole[1] == size:
            del self._holes[at]
        else:
            self._holes[at] = (hole[0] + size, hole[1] - size)
        self._taken[hole[0]] = size
        self.free -= size
