"""Token buckets and quotas, over time that the test makes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import NotFound, RateLimited
from server.registry.data_folder import DataFolder
from server.usage.bucket import TokenBucket
from server.usage.ledger import UsageLedger
from server.usage.quotas import Quota, Quotas, Subject
from server.usage.records import Amount, UsageKey

ACME = Subject("tenant", "acme")


@given(
    rate=st.floats(0.1, 1000),
    steps=st.lists(st.tuples(st.floats(0, 10), st.floats(0, 5000)), max_size=60),
)
def test_a_bucket_never_gives_more_than_its_rate_one_bucket_and_the_last_cost(
    rate: float, steps: list[tuple[float, float]]
) -> None:
    bucket, now, given_out, last = TokenBucket(rate, 0.0), 0.0, 0.0, 0.0
    for passed, cost in steps:
        now += passed
        if bucket.level(now) <= 0:
            wait = bucket.wait_s(0, now)
            assert bucket.level(now + wait) == pytest.approx(0, abs=1e-6)
            continue
        bucket.take(cost, now)
        given_out, last = given_out + cost, cost
        assert given_out <= rate * now + bucket.capacity + last + 1e-6
    assert bucket.level(now + 1e9) == bucket.capacity


class Site:
    def __init__(self, data: Path) -> None:
        self.now, self.wall = 0.0, 86400.0 * 20000 + 10
        self.folder = DataFolder(data)
        self.ledger = UsageLedger(data / "usage", self.folder.usage, 400, lambda: self.wall)
        self.quotas = Quotas(self.folder.quotas, self.ledger, lambda: self.now, lambda: self.wall)

    def pass_s(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds

    def run(self, prompt: int = 0, generated: int = 0, subject: Subject = ACME) -> None:
        with self.quotas.enter([subject], prompt) as grant:
            grant.generated(generated)

    def refused(self, subject: Subject = ACME) -> tuple[str | None, int | None]:
        with pytest.raises(RateLimited) as caught:
            self.run(subject=subject)
        return caught.value.param, caught.value.retry_after_s

    def close(self) -> None:
        self.ledger.close()
        self.folder.store.close()
        self.folder.close()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "data")


def test_requests_per_s(site: Site) -> None:
    site.quotas.put(ACME, Quota(requests_per_s=2))
    site.run()
    site.run()
    assert site.refused() == ("requests_per_s", 1)
    site.run(subject=Subject("tenant", "other"))
    site.pass_s(0.5)
    site.run()
    assert site.refused() == ("requests_per_s", 1)
    site.pass_s(100)
    assert site.quotas.headers([ACME])["x-ratelimit-remaining-requests"] == "2"
    site.quotas.put(ACME, Quota(requests_per_s=0.1))
    site.run()
    assert site.refused() == ("requests_per_s", 10)


def test_tokens_per_s_is_charged_for_prompt_and_answer(site: Site) -> None:
    site.quotas.put(ACME, Quota(tokens_per_s=100))
    site.run(prompt=50, generated=250)
    assert site.refused() == ("tokens_per_s", 2)
    told = site.quotas.headers([ACME])
    assert told == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "3.000s",
    }
    site.pass_s(2.01)
    site.run()


def test_a_refused_request_is_not_charged(site: Site) -> None:
    site.quotas.put(ACME, Quota(requests_per_s=1, tokens_per_s=10))
    site.run(prompt=20)
    for _ in range(5):
        site.refused()
    site.pass_s(1.1)
    site.run()


def test_tokens_per_day_end_at_midnight_and_survive_a_restart(site: Site, tmp_path: Path) -> None:
    for subject in (ACME, Subject("key", "k1"), Subject("adapter", "sql")):
        site.quotas.put(subject, Quota(tokens_per_day=100))
    site.ledger.count(UsageKey("acme", "k1", "sql+json", "d+e"), Amount(1, 40, 0, 60))
    site.ledger.count(UsageKey("other", "k2", "mysql", ""), Amount(1, 40, 0, 60))
    site.run(prompt=40, generated=60)
    left_s = 86400 - 10
    assert site.refused() == ("tokens_per_day", left_s)
    site.close()
    again = Site(tmp_path / "data")
    for subject in (ACME, Subject("key", "k1"), Subject("adapter", "sql")):
        assert again.refused(subject) == ("tokens_per_day", left_s)
    again.pass_s(left_s)
    again.run(prompt=99)
    again.run()
    assert again.quotas.headers([ACME])["x-ratelimit-remaining-tokens"] == "1"
    again.close()


def test_concurrent_requests(site: Site) -> None:
    site.quotas.put(ACME, Quota(concurrent_requests=2))
    with site.quotas.enter([ACME], 1):
        with suppress(ZeroDivisionError), site.quotas.enter([ACME], 1):
            assert site.refused() == ("concurrent_requests", 1)
            raise ZeroDivisionError
        site.run()
        site.quotas.put(ACME, Quota(concurrent_requests=1))
        assert site.refused() == ("concurrent_requests", 1)
    site.run()


def test_quotas_are_kept_and_removed(site: Site, tmp_path: Path) -> None:
    quota = Quota(tokens_per_day=5, weight=2.0)
    site.quotas.put(ACME, quota)
    assert (site.quotas.weight("acme"), site.quotas.weight("other")) == (2.0, 1.0)
    site.close()
    again = Site(tmp_path / "data")
    assert again.quotas.known() == [(ACME, quota)]
    assert again.quotas.remove(ACME) == quota
    with pytest.raises(NotFound):
        again.quotas.remove(ACME)
    again.close()
    last = Site(tmp_path / "data")
    assert last.quotas.known() == []
    last.close()
