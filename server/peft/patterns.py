"""Regular expressions that came with an adapter, and whoever wrote them may mean harm.

What PEFT gives to `re` is matched here by `regex`, which can be stopped. It knows more than `re`: recursion,
fuzzy matches, named lists, look-behind of any length; those cost memory that no timeout bounds, and PEFT
refuses them. So a pattern has to be one of `re`'s, and all of an adapter share a number, a length and a time.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection

import regex  # type: ignore[import-untyped]  # it ships no types; chosen over re for its timeout

from server.errors import InvalidAdapter

_SECONDS = 2.0  # of CPU, to read and match all patterns of one adapter: they may backtrack for ever
_MOST = 4_000  # of one adapter; PEFT may write one for each module
_CHARS = 10_000  # of one pattern
_ALL_CHARS = 400_000
_REPEATS = 10_000  # product of all {n} in a pattern: compiling writes repeated parts out

_BOUND = re.compile(r"\{\s*0*(\d{0,6})\d*\s*(?:,\s*0*(\d{0,6})\d*)?")
_FUZZY = re.compile(r"\{(?!\s*\d*\s*(,\s*\d*\s*)?\})")
_PLAIN = re.compile(r"[\w.]*", re.ASCII)  # all that a module's name is made of


def bad(param: str, message: str) -> InvalidAdapter:
    """An error that names the field or tensor at fault, cut to a readable length."""
    name = param if len(param) <= 200 else param[:200] + "..."
    return InvalidAdapter(f"`{name}` {message}", param=name)


class Pattern:
    """One pattern; what it belongs to counts the time."""

    def __init__(self, patterns: Patterns, field: str, compiled: regex.Pattern) -> None:
        self._patterns, self._field, self._compiled = patterns, field, compiled

    def matches(self, module: str) -> bool:
        """Whether it matches the whole name. Raises InvalidAdapter when that takes too long."""
        try:
            left = self._patterns.seconds_left
            if left > 0:
                return self._compiled.fullmatch(module, timeout=left, concurrent=True) is not None
        except (TimeoutError, MemoryError):
            pass
        raise bad(self._field, "holds patterns that take too long to match")


class Patterns:
    """Those of one adapter; of one thread."""

    def __init__(self) -> None:
        self._deadline = time.thread_time() + _SECONDS  # by the clock, a busy machine would refuse sound ones
        self._count = 0
        self._chars = 0

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.thread_time()

    def admit(self, field: str, patterns: Collection[str]) -> None:
        """Count a field's patterns, before any is compiled. Raises InvalidAdapter when there are too many."""
        self._count += len(patterns)
        self._chars += sum(len(pattern) for pattern in patterns)
        if self._count > _MOST or self._chars > _ALL_CHARS:
            raise bad(field, f"holds too many patterns: {_MOST} of {_ALL_CHARS} characters are the most")

    def compile(self, field: str, pattern: str, *, tail: bool = False) -> Pattern:
        """`tail`: it may also match from behind a dot on. Raises InvalidAdapter that names the field."""
        if len(pattern) > _CHARS or _repeats(pattern) > _REPEATS:
            raise bad(field, f"holds a pattern that is too large: {pattern[:100]!r}")
        if _FUZZY.search(pattern):
            raise bad(field, f"holds braces that are no count of repeats: {pattern[:100]!r}")
        try:
            if self.seconds_left > 0:
                if not _PLAIN.fullmatch(pattern):
                    re.compile(pattern)
                return Pattern(self, field, regex.compile(rf"(.*\.)?({pattern})" if tail else pattern))
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError):
            raise bad(field, f"holds a pattern that is not a regular expression: {pattern[:100]!r}") from None
        raise bad(field, "holds patterns that take too long to read")


def _repeats(pattern: str) -> int:
    """How often its parts may be written out, at most."""
    bounds = (max(int(low or 1), int(high or 1), 1) for low, high in _BOUND.findall(pattern))
    return math.prod(bounds)
