"""What those are owed who were answered PENDING."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from server.scheduling.adapter_gate import Acquire


class Promises:
    """Mixes that were answered PENDING, each once however many wait for it, until it is asked for again.

    Nothing of them may be taken away. Where a version of them cannot be loaded, they are owed the reason: all
    that ask in one step get it, and the next step tries again.
    """

    def __init__(self) -> None:
        self._mixes: set[frozenset[str]] = set()
        self._counts: Counter[str] = Counter()  # in how many of them a digest is
        self._failures: dict[str, Acquire] = {}
        self._given: set[str] = set()  # digests whose failure was given as an answer in this step

    def __contains__(self, digest: str) -> bool:
        """Whether the version is part of a promise."""
        return digest in self._counts

    @property
    def mixes(self) -> Collection[frozenset[str]]:
        return self._mixes

    def add(self, mix: frozenset[str]) -> None:
        if mix not in self._mixes:
            self._mixes.add(mix)
            self._counts.update(mix)

    def remove(self, mix: frozenset[str]) -> list[str]:
        """The mix is owed nothing, or no longer; returns the digests that are part of no promise now."""
        if mix not in self._mixes:
            return []
        self._mixes.remove(mix)
        self._counts.subtract(mix)
        free = [digest for digest in mix if not self._counts[digest]]
        for digest in free:
            del self._counts[digest]
            if digest not in self._given:
                self._failures.pop(digest, None)
        return free

    def fail(self, digest: str, failure: Acquire) -> None:
        """A version could not be loaded. Forgotten at once where it is part of no promise."""
        if digest in self:
            self._failures[digest] = failure

    def failed(self, digest: str) -> bool:
        """Whether the reason of a failure is still owed, or was given in this step."""
        return digest in self._failures

    def failure(self, digests: Iterable[str]) -> Acquire | None:
        """The answer where one of these could not be loaded."""
        digest = next(filter(self.failed, digests), None)
        if digest is None:
            return None
        self._given.add(digest)
        return self._failures[digest]

    def next_step(self) -> None:
        """Failures that were given are over: who asks from now on starts a new load."""
        for digest in self._given:
            self._failures.pop(digest, None)
        self._given.clear()
