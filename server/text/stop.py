"""Stop strings over a stream of text pieces, at the same cost for each character whatever they are."""

from __future__ import annotations

from collections.abc import Sequence


class StopAutomaton:
    """All stop strings of a request as one machine (Aho and Corasick 1975). Never changes: choices share it.

    A state is the longest end of the text so far that is a beginning of a stop string; 0 is none. Libraries
    that have this machine tell matches alone, not the state, which says how much text to hold back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Takes time and memory in proportion to the characters of the stops together."""
        self._next: dict[tuple[int, str], int] = {}
        self._fallback = [0]  # the longest other state that is an end of this one
        self.length = [0]  # characters of each state
        self.found = [0]  # characters of the longest stop string that the text in a state ends with; 0: none
        for stop in stops:
            self._add(stop)
        self._link()
        self.first = frozenset(stop[0] for stop in stops)  # characters that lead out of state 0

    def step(self, state: int, char: str) -> int:
        """The state after one more character: over a whole text, two look-ups for each at most."""
        following = self._next.get((state, char))
        while following is None and state:
            state = self._fallback[state]
            following = self._next.get((state, char))
        return following or 0

    def _add(self, stop: str) -> None:
        state = 0
        for length, char in enumerate(stop, 1):
            new = len(self.length)
            state = self._next.setdefault((state, char), new)
            if state == new:
                self._fallback.append(0)
                self.length.append(length)
                self.found.append(0)
        self.found[state] = len(stop)

    def _link(self) -> None:
        """Shortest states first: the fallback of a state is a step from the fallback of the one before it."""
        edges = sorted(self._next.items(), key=lambda edge: self.length[edge[1]])
        for (before, char), state in edges:
            if before:
                fallback = self._fallback[state] = self.step(self._fallback[before], char)
                self.found[state] = self.found[state] or self.found[fallback]


class StopStrings:
    """Passes text on until the first stop string is complete, whatever the pieces it comes in.

    Text that may turn out to be the beginning of a stop string is held back. Of several stop strings the one
    that is complete first ends the text (the longest, where two end together).
    """

    def __init__(self, automaton: StopAutomaton | None, *, include: bool = False) -> None:
        """None: there are no stop strings."""
        self._automaton = automaton
        self._include = include
        self._state = 0
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that can be shown now. Sets `stopped` when a stop string was met."""
        automaton = self._automaton
        if automaton is None or not piece:
            return piece
        text, state = self._held + piece, self._state
        for end, char in enumerate(piece, len(self._held) + 1):
            if not state and char not in automaton.first:
                continue  # nearly all of a text
            state = automaton.step(state, char)
            if automaton.found[state]:
                self.stopped = True
                self._held = ""
                return text[: end if self._include else end - automaton.found[state]]
        self._state = state
        certain = len(text) - automaton.length[state]
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        self._state = 0
        return text
