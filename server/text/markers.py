"""Where a marker begins in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def split_at(text: str, markers: Sequence[str]) -> tuple[str, str | None, str]:
    """The text before the first of the markers, that marker, and what follows it. Where there is none: the
    text that is certainly before one, None, and the end that may be the beginning of one."""
    found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
    if found:
        at, marker = min(found, key=lambda each: each[0])
        return text[:at], marker, text[at + len(marker) :]
    held = max((_overlap(text, marker) for marker in markers), default=0)
    return text[: len(text) - held], None, text[len(text) - held :]


def _overlap(text: str, marker: str) -> int:
    """How many characters of the text's end begin the marker."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)
