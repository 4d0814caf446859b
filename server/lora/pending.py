"""Who was told to ask again: the mixes whose adapters are on their way."""

from __future__ import annotations

from collections import Counter


class PendingMixes:
    """Mixes that wait, each once however many ask for it, and so the digests that may not be taken away."""

    def __init__(self) -> None:
        self._mixes: set[frozenset[str]] = set()
        self._waiters: Counter[str] = Counter()  # in how many of them a digest is

    def __contains__(self, digest: str) -> bool:
        """Whether somebody waits for it."""
        return digest in self._waiters

    def add(self, mix: frozenset[str]) -> None:
        if mix not in self._mixes:
            self._mixes.add(mix)
            self._waiters.update(mix)

    def remove(self, mix: frozenset[str]) -> list[str]:
        """The mix waits no longer, if it did; returns the digests that nobody waits for now."""
        if mix not in self._mixes:
            return []
        self._mixes.remove(mix)
        self._waiters.subtract(mix)
        done = [digest for digest in mix if not self._waiters[digest]]
        for digest in done:
            del self._waiters[digest]
        return done
