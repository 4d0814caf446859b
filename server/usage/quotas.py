"""How much tenants, keys and adapters may use: what was set, and how much of it is used now."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

from server.errors import NotFound, RateLimited
from server.usage.bucket import TokenBucket
from server.usage.ledger import UsageLedger
from server.usage.records import DAY_S, Amount, UsageQuery

QuotaKind = Literal["tenant", "key", "adapter"]
QUOTA_KINDS: tuple[QuotaKind, ...] = get_args(QuotaKind)


class Subject(NamedTuple):
    """Whose quota. `id`: the tenant's name, the key's id, or the adapter's name as `GET /v1/usage` has it."""

    kind: QuotaKind
    id: str


@dataclass(frozen=True)
class Quota:
    """What a subject may use at most; None: as much as there is. The last three are of tenants alone."""

    requests_per_s: float | None = None
    tokens_per_s: float | None = None  # of prompt and answer together, as the next
    tokens_per_day: int | None = None  # of UTC
    concurrent_requests: int | None = None
    adapters_stored: int | None = None
    bytes_stored: int | None = None  # of the weights of all versions kept
    weight: float | None = None  # its share of service beside a tenant of weight 1


class QuotaStore(Protocol):
    """Where quotas survive. Every call may wait for a disk, and belongs in a thread."""

    def load(self) -> dict[Subject, Quota]: ...

    def put(self, subject: Subject, quota: Quota) -> None: ...

    def remove(self, subject: Subject) -> None: ...


class _Places:
    """How many requests of one subject run; kept while its quota changes."""

    def __init__(self) -> None:
        self.taken = 0


class _Account:
    """What one subject has used of its quota."""

    def __init__(self, subject: Subject, quota: Quota, now: float, day: int, today: int) -> None:
        self.subject = subject
        self.quota = quota
        self.requests = TokenBucket(quota.requests_per_s, now) if quota.requests_per_s else None
        self.tokens = TokenBucket(quota.tokens_per_s, now) if quota.tokens_per_s else None
        self.places = _Places()
        self._day = day
        self._today = today  # tokens

    def left_today(self, wall: float) -> int | None:
        """Tokens; below zero where more were used."""
        if self.quota.tokens_per_day is None:
            return None
        return self.quota.tokens_per_day - (self._today if int(wall) // DAY_S == self._day else 0)

    def check(self, now: float, wall: float) -> None:
        """Raises RateLimited."""
        if self.requests is not None and (wait := self.requests.wait_s(1, now)) > 0:
            raise self._refusal("requests_per_s", wait)
        if self.tokens is not None and self.tokens.level(now) <= 0:
            raise self._refusal("tokens_per_s", self.tokens.wait_s(0, now))
        left = self.left_today(wall)
        if left is not None and left <= 0:
            raise self._refusal("tokens_per_day", DAY_S - wall % DAY_S)
        most = self.quota.concurrent_requests
        if most is not None and self.places.taken >= most:
            raise self._refusal("concurrent_requests", 1)

    def take(self, requests: int, tokens: int, now: float, wall: float) -> None:
        if self.requests is not None and requests:
            self.requests.take(requests, now)
        if self.tokens is not None:
            self.tokens.take(tokens, now)
        if (day := int(wall) // DAY_S) != self._day:
            self._day, self._today = day, 0
        self._today += tokens

    def _refusal(self, limit: str, wait_s: float) -> RateLimited:
        return RateLimited(
            f"The quota of this {self.subject.kind}, {limit} = {getattr(self.quota, limit):g}, is used up.",
            param=limit,
            retry_after_s=max(1, math.ceil(wait_s)),
        )


class Grant:
    """Of one request that was let in: what it generates is charged as it comes."""

    def __init__(self, charge: Callable[[int], None] | None = None) -> None:
        self._charge = charge

    def generated(self, tokens: int) -> None:
        if self._charge is not None:
            self._charge(tokens)


class Quotas:
    """All quotas, in memory; a request of subjects that have none pays two look-ups.

    A request is let in while every bucket of its subjects holds something. It is charged its prompt then and
    its output as it comes, so a level can fall below zero, and nobody is let in until it is above again. What
    a day's tokens came to is taken from usage at the start. `clock`: monotonic, `wall`: since 1970, seconds.
    """

    def __init__(
        self,
        store: QuotaStore,
        ledger: UsageLedger,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._clock = clock
        self._wall = wall
        self._writer = threading.Lock()
        quotas = store.load()
        used = self._used_today() if quotas else Counter[Subject]()
        self._accounts = {
            subject: self._open(subject, quota, used[subject]) for subject, quota in quotas.items()
        }

    def known(self) -> list[tuple[Subject, Quota]]:
        """All, sorted."""
        return sorted(((s, account.quota) for s, account in list(self._accounts.items())), key=lambda e: e[0])

    def get(self, subject: Subject) -> Quota | None:
        account = self._accounts.get(subject)
        return account.quota if account else None

    def put(self, subject: Subject, quota: Quota) -> None:
        """From now on; what runs counts as running still. Writes: in a thread."""
        with self._writer:
            self._store.put(subject, quota)
            account = self._open(subject, quota, self._used_today()[subject])
            if (old := self._accounts.get(subject)) is not None:
                account.places = old.places
            self._accounts[subject] = account

    def remove(self, subject: Subject) -> Quota:
        """Raises NotFound. Writes: in a thread."""
        with self._writer:
            quota = self.get(subject)
            if quota is None:
                raise NotFound(f"This {subject.kind} has no quota.", param="name")
            self._store.remove(subject)
            del self._accounts[subject]
        return quota

    def weight(self, tenant: str) -> float:
        quota = self.get(Subject("tenant", tenant)) if self._accounts else None
        return quota.weight or 1.0 if quota else 1.0

    def check(self, subjects: Iterable[Subject]) -> None:
        """Raises RateLimited where a request of these would be refused."""
        for account in self._of(subjects):
            account.check(self._clock(), self._wall())

    @contextmanager
    def enter(self, subjects: Sequence[Subject], prompt_tokens: int) -> Iterator[Grant]:
        """One request, while it runs. Raises as `check`, and charges nothing then."""
        accounts = self._of(subjects)
        if not accounts:
            yield Grant()
            return
        self.check(subjects)
        self._charge(subjects, 1, prompt_tokens)
        places = [account.places for account in accounts]
        for each in places:
            each.taken += 1
        try:
            yield Grant(lambda tokens: self._charge(subjects, 0, tokens))
        finally:
            for each in places:
                each.taken -= 1

    def headers(self, subjects: Iterable[Subject]) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*`, of the subject with least left; none where nothing limits them."""
        now, wall = self._clock(), self._wall()
        requests, tokens = [], []
        for account in self._of(subjects):
            if (bucket := account.requests) is not None:
                requests.append(_state(bucket, now))
            if (bucket := account.tokens) is not None:
                tokens.append(_state(bucket, now))
            if (left := account.left_today(wall)) is not None:
                tokens.append((max(left, 0), account.quota.tokens_per_day or 0, DAY_S - wall % DAY_S))
        told: dict[str, str] = {}
        for name, states in (("requests", requests), ("tokens", tokens)):
            if states:
                left, limit, reset_s = min(states)
                told |= {
                    f"x-ratelimit-limit-{name}": str(limit),
                    f"x-ratelimit-remaining-{name}": str(left),
                    f"x-ratelimit-reset-{name}": f"{reset_s:.3f}s",
                }
        return told

    def _of(self, subjects: Iterable[Subject]) -> list[_Account]:
        if not self._accounts:
            return []
        return [account for subject in subjects if (account := self._accounts.get(subject)) is not None]

    def _charge(self, subjects: Iterable[Subject], requests: int, tokens: int) -> None:
        now, wall = self._clock(), self._wall()
        for account in self._of(subjects):
            account.take(requests, tokens, now, wall)

    def _open(self, subject: Subject, quota: Quota, today: int) -> _Account:
        return _Account(subject, quota, self._clock(), int(self._wall()) // DAY_S, today)

    def _used_today(self) -> Counter[Subject]:
        """Tokens, by usage. One look for all subjects: there may be thousands."""
        self._ledger.fold()
        start = int(self._wall()) // DAY_S * DAY_S
        used = Counter[Subject]()
        for line in self._ledger.lines(UsageQuery(start=start, group_by=("tenant", "key", "adapter"))):
            tenant, key, adapter = map(str, line.group)
            tokens = _tokens(line.amount)
            used[Subject("tenant", tenant)] += tokens
            used[Subject("key", key)] += tokens
            for label in adapter.split("+"):  # of a composition each
                used[Subject("adapter", label)] += tokens
        return used


def _tokens(amount: Amount) -> int:
    return amount.prompt_tokens + amount.completion_tokens


def _state(bucket: TokenBucket, now: float) -> tuple[int, int, float]:
    """What is left, of how much, and in how many seconds it is full."""
    return max(0, math.floor(bucket.level(now))), int(bucket.capacity), bucket.wait_s(bucket.capacity, now)
