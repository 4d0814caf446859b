from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from load_tests.gpu import swap
from load_tests.gpu.figures import Deadline, Results
from load_tests.gpu.subject import Subject, Version, adapter_bytes, subject
from load_tests.gpu.swap import Copy, Storm, Window, copies, copy_figures, storm_figures, window, windows

RANK, STEPS = 8, 40


@pytest.fixture
def on() -> Iterator[Subject]:
    with subject(
        "tiny",
        ranks=[RANK],
        arena_ranks=RANK * swap.IN_ARENA,
        max_num_seqs=20,
        kv_tokens=swap.longest(STEPS),
        host_bytes=adapter_bytes("tiny", RANK) * swap.host_images(swap.IN_ARENA),
    ) as found:
        yield found


def test_a_copy_is_one_of_the_whole_adapter_from_the_host(on: Subject) -> None:
    found = copies(on, Version(RANK), rounds=3)
    assert [copy.nbytes for copy in found] == [adapter_bytes("tiny", RANK)] * 3
    assert all(copy.plain_s > 0 and copy.engine_s > 0 for copy in found)
    stats = on.engine.stats()
    assert stats.adapter_loads == 1 + 3 + 2
    assert len(stats.on_host) == len(stats.resident) == 1


def test_storms_load_and_evict_while_everybody_decodes(on: Subject) -> None:
    results = Results("swap")
    seen = windows(on, RANK, 20, steps=STEPS, rounds=2, deadline=Deadline(60), results=results)
    assert [(one.weather, one.round) for one in seen] == [
        (weather, number) for weather in ("calm", "host", "disk") for number in (0, 1)
    ]
    assert sorted(results.rows, key=seen.index) == seen
    for one in seen:
        assert len(one.gaps_s) == STEPS
        assert 0 < min(one.gaps_s) <= one.p99_s <= max(one.gaps_s)
    calm, host, disk = seen[0], seen[2], seen[4]
    assert (calm.loads, calm.evictions, calm.load_s) == (0, 0, ())
    assert host.loads > swap.UNDER_WAY
    assert host.evictions > 0
    assert disk.loads > 0
    assert all(seconds > 0 for seconds in (*host.load_s, *disk.load_s))
    stats = on.engine.stats()
    assert stats.running == stats.waiting == 0
    assert {f"rank-8-{number}" for number in range(8)} <= set(stats.resident)  # those who decode kept theirs
    assert stats.preemptions == 0
    figures = storm_figures(seen, [Copy(1000, 1e-6, 1e-6)])
    assert all(math.isfinite(value) for figure in figures for value in figure.values)


def test_what_comes_from_disk_is_forgotten(on: Subject) -> None:
    storm = Storm(on, [Version(RANK, 100), Version(RANK, 101)], forget=True)
    found = window(on, "disk", storm, [Version(RANK)], STEPS)
    on.turn()
    assert found.loads > 0
    stats = on.engine.stats()
    assert stats.resident == stats.on_host == ("rank-8-0",)


def test_a_sequence_that_gets_no_token_is_an_error(on: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "output_tokens", lambda steps: steps // 2)
    with pytest.raises(RuntimeError, match="0 of 1 sequences"):
        window(on, "calm", Storm(on, [], forget=False), [Version(RANK)], STEPS)


def test_copy_figures() -> None:
    plain, engine, ratio = copy_figures([Copy(10**9, 0.5, 1.0), Copy(10**9, 0.5, 0.5)])
    assert plain.values == (2.0, 2.0)
    assert engine.values == (1.0, 2.0)
    assert (ratio.values, ratio.target, ratio.verdict) == ((0.5, 1.0), ">= 0.80", "below")


def test_storm_figures() -> None:
    seen = [
        Window("calm", 0, (0.1,) * 10, 0, 0, ()),
        Window("host", 0, (0.2,) * 10, 4, 4, (0.5, 0.5)),
        Window("disk", 0, (0.12,) * 10, 3, 0, (0.9,)),
    ]
    figures = {figure.name: figure for figure in storm_figures(seen, [Copy(10**9, 0.4, 0.4)])}
    assert figures["calm: inter-token p99, ms"].median == pytest.approx(100)
    assert figures["storm from host: p99 / calm"].median == pytest.approx(2)
    assert figures["storm from host: p99 / calm"].verdict == "above"
    assert figures["storm from disk: p99 / calm"].verdict == "ok"
    assert figures["storm from host: loaded, GB/s"].median == pytest.approx(2)
    assert figures["copy beside steps: rate / plain"].median == pytest.approx(0.8)
