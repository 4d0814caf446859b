"""What is counted in memory goes to disk now and then."""

from __future__ import annotations

import threading

import pytest

from server.access import flusher
from server.access.flusher import Flusher


def test_it_flushes_when_due_and_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(flusher.time, "monotonic", lambda: now)
    threads: list[str] = []
    flushed = threading.Event()

    def flush() -> None:
        threads.append(threading.current_thread().name)
        flushed.set()

    made = Flusher(flush, 10.0, "sometimes")
    made.when_due()
    assert threads == []
    now += 10.0
    made.when_due()
    made.when_due()  # it has just been done
    assert flushed.wait(20)
    made.close()
    assert [name.startswith("sometimes") for name in threads] == [True, False]
    now += 10.0
    made.when_due()  # too late, and harmless
    assert len(threads) == 2
