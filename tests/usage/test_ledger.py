"""Counting, killing, folding: nothing missing, nothing twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.registry.data_folder import DataFolder
from server.usage.journal import Journal, left_behind, read_journal
from server.usage.ledger import UsageLedger
from server.usage.records import Amount, UsageKey, UsageLine, UsageQuery, UsageRow

KEYS = [
    UsageKey("acme", "k1", "acme:sql", "d1"),
    UsageKey("acme", "", "base", ""),
    UsageKey("é", "k2", "b", "d"),
]


class Memory:
    """A store that can be full."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, str, UsageKey], Amount] = {}
        self.full = False

    def save(self, rows: Sequence[UsageRow]) -> None:
        if self.full:
            raise OSError("no room")
        self.rows |= {(row.hour, row.journal, row.key): row.amount for row in rows}

    def forget(self, before: int) -> None:
        self.rows = {place: amount for place, amount in self.rows.items() if place[0] >= before}

    def lines(self, query: UsageQuery) -> list[UsageLine]:
        raise NotImplementedError

    def sums(self) -> Counter[tuple[int, UsageKey]]:
        sums = Counter[tuple[int, UsageKey]]()
        for (hour, _, key), amount in self.rows.items():
            sums[hour, key] += amount.completion_tokens
        return sums


class Clock:
    def __init__(self) -> None:
        self.now = 3600.0 * 1000

    def __call__(self) -> float:
        return self.now


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("count"), st.sampled_from(KEYS), st.integers(1, 100)),
            st.tuples(st.sampled_from(["fold", "kill", "full", "room", "close"])),
            st.tuples(st.just("clock"), st.sampled_from([1.0, 3600.0, -3600.0])),
        ),
        max_size=40,
    )
)
def test_whatever_happens_the_sums_are_those_counted(
    steps: list[tuple[object, ...]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`kill`: another ledger takes the folder over while the old one's threads and memory are forgotten."""
    folder, store, clock = tmp_path_factory.mktemp("usage"), Memory(), Clock()
    ledger, expected = UsageLedger(folder, store, 400, clock), Counter[tuple[int, UsageKey]]()
    for name, *rest in steps:
        if name == "count":
            key, tokens = rest
            assert isinstance(key, UsageKey)
            assert isinstance(tokens, int)
            ledger.count(key, Amount(1, 0, 0, tokens))
            expected[int(clock.now) // 3600 * 3600, key] += tokens
        elif name == "fold":
            ledger.fold()
        elif name in ("full", "room"):
            store.full = name == "full"
        elif name == "clock":
            clock.now += float(str(rest[0]))
        else:
            if name == "close":
                ledger.close()
            ledger = UsageLedger(folder, store, 400, clock)
    store.full = False
    ledger.close()
    assert store.sums() == +expected


CHILD = """
import os, signal, sys
from pathlib import Path
from server.registry.data_folder import DataFolder
from server.usage.ledger import UsageLedger
from server.usage.records import Amount, UsageKey

folder = DataFolder(Path(sys.argv[1]))
ledger = UsageLedger(Path(sys.argv[1]) / "usage", folder.usage, 400)
ledger.fold()
for at in range(1000):
    ledger.count(UsageKey("t", "", f"a{at % 7}", ""), Amount(1, 2, 1, at))
    if at == 500:
        ledger.fold()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_all_that_it_counted(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for life in (1, 2):
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(data)], cwd=Path(__file__).parents[2], timeout=60
        )
        assert child.returncode == -signal.SIGKILL
        folder = DataFolder(data)
        ledger = UsageLedger(data / "usage", folder.usage, 400)
        (line,) = ledger.lines(UsageQuery(group_by=()))
        assert line.amount == Amount(1000 * life, 2000 * life, 1000 * life, sum(range(1000)) * life)
        assert len(ledger.lines(UsageQuery(group_by=("adapter",)))) == 7
        ledger.close()
        folder.close()
        assert list((data / "usage").iterdir()) == []


def test_a_record_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 3600)
    place = journal.add(KEYS[0], Amount(1, 1, 1, 1))
    journal.add(KEYS[1], Amount(2, 2, 2, 2))
    journal.put(place, Amount(3, 4, 5, 6))
    (path,) = left_behind(tmp_path)
    whole = [(row.hour, row.key, row.amount) for row in read_journal(path)]
    assert whole == [(3600, KEYS[0], Amount(3, 4, 5, 6)), (3600, KEYS[1], Amount(2, 2, 2, 2))]
    size = path.stat().st_size
    for cut in range(size):
        os.truncate(path, size - 1 - cut)
        rows = list(read_journal(path))
        assert [row.key for row in rows] == KEYS[: len(rows)]
        assert len(rows) < 2
    journal.remove()


def test_a_journal_that_cannot_be_written_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Memory()
    ledger = UsageLedger(tmp_path / "usage", store, 400)

    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        ledger.count(KEYS[0], Amount(1, 0, 0, 5))
    ledger.count(KEYS[0], Amount(1, 0, 0, 6))
    ledger.close()
    assert list(store.sums().values()) == [11]


def test_old_hours_are_forgotten(tmp_path: Path) -> None:
    store, clock = Memory(), Clock()
    for _ in range(3):
        ledger = UsageLedger(tmp_path / "usage", store, 1, clock)
        ledger.count(KEYS[0], Amount(1, 0, 0, 1))
        ledger.close()
        clock.now += 86400
    assert sorted({hour for hour, _ in store.sums()}) == [int(clock.now) - 2 * 86400, int(clock.now) - 86400]
