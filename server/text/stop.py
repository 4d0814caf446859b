"""Stop strings over a stream of text pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on until the first stop string is complete, whatever the pieces it comes in.

    Text that may turn out to be the beginning of a stop string is held back. Of several stop strings the one
    that is complete first ends the text (the longest, where two end together).
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that can be shown now. Sets `stopped` when a stop string was met."""
        if not self._stops or not piece:
            return piece
        text = self._held + piece
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            end, start = min(matches)
            self.stopped = True
            self._held = ""
            return text[: end if self._include else start]
        certain = min(self._first_possible_start(text, stop) for stop in self._stops)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _first_possible_start(text: str, stop: str) -> int:
        """Where the longest end of `text` begins that is a beginning of `stop`; len(text) for none."""
        at = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
        while at >= 0 and not stop.startswith(text[at:]):
            at = text.find(stop[0], at + 1)
        return at if at >= 0 else len(text)
