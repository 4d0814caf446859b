"""Decode, prefill and ranks: every mix in every round, and figures that follow from the rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest

from load_tests.gpu import levers, ranks
from load_tests.gpu.context import Context
from load_tests.gpu.engine import Row, decode_figures, mixes_of, prefill_figures, run, stages
from load_tests.gpu.figures import Deadline, Results
from load_tests.gpu.subject import Subject, Version, subject
from load_tests.gpu.workload import WORKLOADS, Workload

RATE = 1e9  # bytes/s
WORK = replace(
    WORKLOADS["tiny"], sequences=8, batches=(8, 1), output=6, prefill=(4, 32), large_batch=9, rounds=2
)


@pytest.fixture
def on() -> Iterator[Subject]:
    with subject(
        "tiny", ranks=[16], arena_ranks=16 * 8, max_num_seqs=WORK.most_sequences, kv_tokens=WORK.longest
    ) as found:
        yield found


def measured(on: Subject, monkeypatch: pytest.MonkeyPatch, seconds: float) -> Results:
    """With a copy rate, so that there is a floor."""
    monkeypatch.setattr(Context, "rate", RATE)
    context = Context(WORK, Results("engine"), Deadline(seconds), lambda: on)
    run(context.subject(), context, WORK)
    return context.results


def row(mix: str, number: int, step_s: float, *, batch: int = 64, prefill_s: float = 1.0) -> Row:
    return Row("decode", mix, batch, number, prefill_s, step_s, step_bytes=int(RATE * 3))


def test_every_mix_is_measured_in_every_round(on: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    results = measured(on, monkeypatch, 60)
    seen = [(row.part, row.batch, row.mix, row.round) for row in results.rows]
    assert len(seen) == len(set(seen))
    assert [key[:3] for key in seen if key[3] == 0] == [
        *[("decode", 8, mix) for mix in ("base", "one", "distinct")],
        *[("decode", 1, mix) for mix in ("base", "one")],
        *[("prefill", 4, mix) for mix in ("base", "one", "distinct")],
        *[("decode", 9, mix) for mix in ("base", "one")],
    ]
    assert all(row.prefill_s > 0 and (row.step_s > 0) == (row.part != "prefill") for row in results.rows)
    for figure in results.figures:
        assert len(figure.values) == 2
        assert all(math.isfinite(value) and value > 0 for value in figure.values)
    by_key = {(row.batch, row.mix, row.round): row for row in results.rows if row.part == "decode"}
    shares = next(figure for figure in results.figures if figure.name == "decode 8, distinct: share of floor")
    assert shares.values == tuple(
        by_key[8, "distinct", n].step_bytes / RATE / by_key[8, "distinct", n].step_s for n in (0, 1)
    )
    assert by_key[8, "distinct", 0].step_bytes - by_key[8, "base", 0].step_bytes == 8 * (
        by_key[8, "one", 0].step_bytes - by_key[8, "base", 0].step_bytes
    )
    assert on.engine.idle_ms() is None


def test_the_paths_it_ran_on_are_said_and_written(on: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    results = measured(on, monkeypatch, 0)
    assert results.about["fast_paths"] == {"fused": True, "flat": True, "graphs": False}
    assert results.text.splitlines()[0].startswith("tiny on cpu")
    assert "fused yes, flat yes, graphs NO" in results.text


def test_nothing_is_measured_when_the_time_is_over(on: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    results = measured(on, monkeypatch, 0)
    assert (results.rows, results.figures) == ([], [])
    assert "out of time" in results.text


def test_the_mixes_of_a_batch() -> None:
    assert mixes_of(1, 16, 64).keys() == {"base", "one"}
    mixes = mixes_of(64, 16, 64)
    assert [len(mix) for mix in mixes.values()] == [64, 64, 64]
    assert [len(set(mix)) for mix in mixes.values()] == [1, 1, 64]
    assert "distinct" not in mixes_of(256, 16, 64)


def test_what_is_worth_most_comes_first() -> None:
    found = [(stage.part, len(stage.mixes["base"])) for stage in stages(Workload())]
    assert found == [("decode", 64), ("decode", 1), ("decode", 16), ("prefill", 16), ("decode", 256)]


def test_mixed_ranks_add_up_to_those_beside_them() -> None:
    mixes = ranks.mixes_of(16)
    by_mix = {name: [v.rank for v in mix if v is not None] for name, mix in mixes.items()}
    assert set(by_mix["mixed"]) == {8, 16, 32, 64}
    assert sum(by_mix["mixed"]) == sum(by_mix["same sum"]) == sum(by_mix["largest"]) / 2
    assert set(by_mix["largest"]) == {64}
    for mix in ("mixed", "same sum", "largest"):
        assert len(set(mixes[mix])) == 16
    assert Version(64, 1) in set(mixes["mixed"]) & set(mixes["largest"])  # loaded once
    assert sum(version.rank for version in ranks.versions_of(16)) < sum(map(sum, by_mix.values()))


def test_levers_are_compared_with_none() -> None:
    def no_engine() -> Subject:
        raise AssertionError("an engine for each choice")

    results = Results("levers")
    levers.measure(Context(WORKLOADS["tiny"], results, Deadline(60), no_engine))
    choices = ("all", "rotate-write", "shrink-beside", "dependent-launch")
    names = [f"{choice}, {mix}: speed / none" for choice in choices for mix in ("base", "one", "distinct")]
    assert [figure.name for figure in results.figures] == names
    assert all(figure.values[0] > 0 for figure in results.figures)


def test_ranks_are_measured_on_an_engine_of_their_own() -> None:
    def no_engine() -> Subject:
        raise AssertionError

    results = Results("ranks")
    ranks.measure(Context(WORKLOADS["tiny"], results, Deadline(60), no_engine))
    assert [row.mix for row in results.rows] == ["base", "mixed", "same sum", "largest"]
    assert results.figures[0].name == "ranks mixed: speed / all 32"


def test_decode_figures() -> None:
    rows = [row("base", 0, 4.0), row("base", 1, 6.0), row("one", 0, 5.0), row("one", 1, 6.0)]
    rows += [row("distinct", 0, 8.0), row("distinct", 1, 6.0)]
    figures = {figure.name: figure for figure in decode_figures(rows, RATE)}
    assert figures["decode 64, base: share of floor"].values == (0.75, 0.5)
    assert figures["decode 64, one: speed / base"].values == (0.8, 1.0)
    assert figures["decode 64, distinct: share of floor"].values == (0.375, 0.5)
    assert {name: figure.target for name, figure in figures.items()} == {
        "decode 64, base: share of floor": ">= 0.75",
        "decode 64, one: speed / base": ">= 0.92",
        "decode 64, distinct: share of floor": ">= 0.75",
        "decode 64, distinct: speed / base": "-",
    }
    assert not any("floor" in figure.name for figure in decode_figures(rows, None))


@pytest.mark.parametrize(
    ("batch", "targets"),
    [(1, [">= 0.75", "-"]), (16, [">= 0.75", "-"]), (64, [">= 0.75", ">= 0.75"]), (256, ["-", "-"])],
)
def test_which_batches_have_a_target(batch: int, targets: list[str]) -> None:
    rows = [row(mix, 0, 4.0, batch=batch) for mix in ("base", "distinct")]
    assert [f.target for f in decode_figures(rows, RATE) if "floor" in f.name] == targets


def test_prefill_figures() -> None:
    rows = [row("base", 0, 0, prefill_s=4.0), row("one", 0, 0, prefill_s=5.0)]
    rows.append(row("distinct", 0, 0, prefill_s=4.0))
    figures = prefill_figures(rows)
    assert [(f.values, f.target, f.verdict) for f in figures] == [
        ((0.8,), ">= 0.90", "below"),
        ((1.0,), ">= 0.90", "ok"),
    ]


def test_rank_figures() -> None:
    rows = [row("base", 0, 1.0), row("mixed", 0, 2.0), row("same sum", 0, 1.9), row("largest", 0, 3.0)]
    speed, adds, share = ranks.figures_of(rows, RATE)
    assert (speed.values, speed.verdict) == ((0.95,), "ok")
    assert (adds.values, adds.verdict) == ((0.5,), "ok")
    assert share.values == (1.5,)
    follows_largest = [*rows[:1], row("mixed", 0, 2.9), *rows[2:]]
    assert [figure.verdict for figure in ranks.figures_of(follows_largest, None)] == ["below", "above"]
    noise = [row("base", 0, 3.5), *rows[1:]]
    assert len(ranks.figures_of(noise, None)) == 1
