"""What is kept of the use of this server: by whom, of what, in which hour, how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

HOUR_S = 3600
DAY_S = 86400

Grouping = Literal["day", "hour", "tenant", "key", "adapter", "version"]
GROUPINGS: tuple[Grouping, ...] = get_args(Grouping)


class UsageKey(NamedTuple):
    """Whose use, and of what. Of a composition `adapter` and `version` are those of its members, joined by
    `+`; of the base model its name and "". `key` is "" without a key of the registry."""

    tenant: str
    key: str
    adapter: str
    version: str


class Amount(NamedTuple):
    """Requests that gave their client something, and their tokens."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt tokens, those that were not computed again
    completion_tokens: int = 0

    def plus(self, other: Amount) -> Amount:
        return Amount(*(mine + more for mine, more in zip(self, other, strict=True)))


class UsageRow(NamedTuple):
    """What one journal knows of one key: all of it, not what came since the last row."""

    hour: int  # its start, seconds since 1970
    journal: str
    key: UsageKey
    amount: Amount


@dataclass(frozen=True)
class UsageQuery:
    """Rows whose hour begins in [`start`, `end`), seconds since 1970, added up by `group_by`."""

    start: int = 0
    end: int = 2**62
    tenant: str | None = None
    key: str | None = None
    adapters: tuple[str, ...] = ()  # any of these labels; none: all
    group_by: tuple[Grouping, ...] = ("hour", "tenant", "key", "adapter", "version")
    after: tuple[int | str, ...] | None = None  # the group of the last line of the page before
    most: int | None = None


class UsageLine(NamedTuple):
    """One line of an answer: the values of `group_by` in the order of GROUPINGS, and their sum."""

    group: tuple[int | str, ...]
    amount: Amount


class UsageStore(Protocol):
    """Where usage survives. Every call may wait for a disk, and belongs in a thread."""

    def save(self, rows: Sequence[UsageRow]) -> None:
        """Idempotent: what was saved of the same hour, journal and key is replaced."""

    def forget(self, before: int) -> None:
        """Drop the hours before `before`, seconds since 1970."""

    def lines(self, query: UsageQuery) -> list[UsageLine]: ...
