"""Reasoning in what a model writes: what stands between `<think>` and `</think>`."""

from __future__ import annotations

from server.text.markers import split_at

BEGIN, END = "<think>", "</think>"


def is_open(text: str) -> bool:
    """Whether it ends within reasoning."""
    return text.rfind(BEGIN) > text.rfind(END)


class Thinking:
    """Parts an answer into reasoning and the rest, as it comes. `inside`: the prompt has begun reasoning."""

    def __init__(self, *, inside: bool) -> None:
        self._inside = inside
        self._held = ""
        self._answered = False  # something of the answer was given, so that no reasoning begins any more

    def push(self, text: str) -> tuple[str, str]:
        """(reasoning, answer) that become certain with this text."""
        text, self._held = self._held + text, ""
        reasoning = ""
        if not self._inside and not self._answered:
            before, marker, rest = split_at(text.lstrip(), [BEGIN])
            if before:
                self._answered = True
                return "", text
            if marker is None:
                self._held = text if rest or not text.strip() else ""
                return "", ""
            self._inside, text = True, rest
        if self._inside:
            reasoning, marker, text = split_at(text, [END])
            if marker is None:
                self._held = text
                return reasoning, ""
            self._inside, self._answered = False, True
        return reasoning, text

    def flush(self) -> tuple[str, str]:
        """The rest, when no more text comes."""
        rest, self._held = self._held, ""
        return (rest, "") if self._inside else ("", rest)
