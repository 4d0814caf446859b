"""Usage as it happens: counted in a journal at once, folded into the store once a second."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from server.usage.journal import Journal, left_behind, read_journal
from server.usage.records import DAY_S, HOUR_S, Amount, UsageKey, UsageLine, UsageQuery, UsageRow, UsageStore

_FOLD_SECONDS = 1.0

_log = logging.getLogger(__name__)


class _Slot:
    """One key in one journal."""

    def __init__(self, journal: Journal | None, hour: int, key: UsageKey) -> None:
        self.amount = Amount()
        self._journal = journal
        self._hour = hour
        self._key = key
        self._id = journal.id if journal else f"memory-{time.time_ns()}"
        self._place: int | None = None

    def add(self, amount: Amount) -> None:
        """Raises OSError where it is counted in memory alone."""
        self.amount = self.amount.plus(amount)
        if self._journal is None:
            return
        if self._place is None:
            self._place = self._journal.add(self._key, self.amount)
        else:
            self._journal.put(self._place, self.amount)

    def row(self) -> UsageRow:
        return UsageRow(self._hour, self._id, self._key, self.amount)


class UsageLedger:
    """Counts for one server. What `count` was told when it returned outlives a kill of the process; it is in
    the store within about a second. Journals that a killed server left are folded in at the start.

    A row of the store holds all that its journal knows, so to fold it in twice changes nothing, and nothing
    is counted twice. Disks that are full or fail cost no request: what cannot be written is kept in memory
    and tried again. Thread-safe. `kept_days`: for how long the store has it. `clock`: seconds since 1970.
    """

    def __init__(
        self, folder: Path, store: UsageStore, kept_days: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._folder = folder
        self._store = store
        self._kept_s = kept_days * DAY_S
        self._clock = clock
        self._lock = threading.Lock()
        self._folding = threading.Lock()
        self._hour = -1
        self._journal: Journal | None = None
        self._slots: dict[UsageKey, _Slot] = {}
        self._unsaved: set[_Slot] = set()
        self._full: list[Journal] = []  # of hours that are over
        self._failing = False
        folder.mkdir(mode=0o700, exist_ok=True)
        self._left = left_behind(folder)
        self.fold()
        self._news, self._ended = threading.Event(), threading.Event()
        self._folder_thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._folder_thread.start()

    def count(self, key: UsageKey, amount: Amount) -> None:
        """Add it to the present hour. Call it before what is counted is sent. Never fails."""
        hour = int(self._clock()) // HOUR_S * HOUR_S
        with self._lock:
            if hour != self._hour:
                self._turn(hour)
            slot = self._slots.get(key)
            if slot is None:
                slot = self._slots[key] = _Slot(self._journal, hour, key)
            try:
                slot.add(amount)
            except OSError as error:
                self._warn(error)
            self._unsaved.add(slot)
        self._news.set()

    def fold(self) -> None:
        """Bring the store up to date. Belongs in a thread. Failures are logged, and tried again."""
        with self._folding:
            with self._lock:
                unsaved, self._unsaved = self._unsaved, set()
                full, self._full = self._full, []
            try:
                self._fold([slot.row() for slot in unsaved], full)
            except Exception as error:
                self._warn(error)
                with self._lock:
                    self._unsaved |= unsaved
                    self._full += full
            else:
                self._failing = False

    def lines(self, query: UsageQuery) -> list[UsageLine]:
        """As it was at the last `fold`. Belongs in a thread."""
        return self._store.lines(query)

    def close(self) -> None:
        """Idempotent. Before the store is; nothing is counted any more."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._news.set()
        self._folder_thread.join()
        with self._lock:
            self._turn(-1)
        self.fold()

    def _fold(self, rows: list[UsageRow], full: list[Journal]) -> None:
        while self._left:
            self._store.save(list(read_journal(self._left[0])))
            self._left.pop(0).unlink(missing_ok=True)
        if rows:
            self._store.save(rows)
        for journal in full:
            journal.remove()
        if full or self._hour < 0:
            self._store.forget(int(self._clock()) - self._kept_s)

    def _turn(self, hour: int) -> None:
        """To another hour; -1: to none. The lock is held."""
        if self._journal is not None:
            self._full.append(self._journal)
        self._hour, self._slots, self._journal = hour, {}, None
        if hour >= 0:
            try:
                self._journal = Journal(self._folder, hour)
            except OSError as error:
                self._warn(error)

    def _run(self) -> None:
        while not self._ended.is_set():
            self._news.wait()
            self._ended.wait(_FOLD_SECONDS)
            self._news.clear()
            self.fold()

    def _warn(self, error: Exception) -> None:
        """Once, until it works again."""
        if not self._failing:
            self._failing = True
            with suppress(Exception):
                _log.error("usage is counted in memory for now: %s", error)
