from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from load_tests.gpu import engine
from load_tests.gpu.engine import (
    Row,
    decode_figures,
    mixes_of,
    prefill_figures,
    rank_figures,
    rank_mixes,
    run,
)
from load_tests.gpu.figures import Deadline
from load_tests.gpu.subject import Subject, Version, subject

RATE = 1e9  # bytes/s


@pytest.fixture
def on() -> Iterator[Subject]:
    ranks = {16, 32, *engine.MIXED}
    with subject(
        "tiny", ranks=ranks, arena_ranks=engine.arena_ranks(), max_num_seqs=8, kv_tokens=64
    ) as found:
        yield found


def timed(on: Subject, seconds: float) -> tuple[list[Row], list[engine.Figure]]:
    return run(
        on,
        batches=[8, 1],
        prompt=16,
        output=6,
        prefill=(4, 32),
        rounds=2,
        deadline=Deadline(seconds),
        rate=RATE,
    )


def row(mix: str, number: int, step_s: float, *, batch: int = 64, prefill_s: float = 1.0) -> Row:
    return Row("decode", mix, batch, number, prefill_s, step_s, step_bytes=int(RATE * 3))


def test_every_mix_is_measured_in_every_round(on: Subject) -> None:
    rows, figures = timed(on, 60)
    seen = [(row.part, row.batch, row.mix, row.round) for row in rows]
    assert len(seen) == len(set(seen))
    assert [key[:3] for key in seen if key[3] == 0] == [
        *[("decode", 8, mix) for mix in ("base", "one", "distinct")],
        *[("decode", 1, mix) for mix in ("base", "one")],
        *[("prefill", 4, mix) for mix in ("base", "one", "distinct")],
        *[("ranks", 8, mix) for mix in ("base", "mixed", "same sum", "largest")],
    ]
    assert all(row.prefill_s > 0 and (row.step_s > 0) == (row.part != "prefill") for row in rows)
    for figure in figures:
        assert len(figure.values) == 2
        assert all(math.isfinite(value) for value in figure.values)
        assert "adds" in figure.name or min(figure.values) > 0  # what is added may be less than the noise
    by_key = {(row.batch, row.mix, row.round): row for row in rows if row.part == "decode"}
    shares = next(figure for figure in figures if figure.name == "decode 8, distinct: share of floor")
    assert shares.values == tuple(
        by_key[8, "distinct", n].step_bytes / RATE / by_key[8, "distinct", n].step_s for n in (0, 1)
    )
    assert by_key[8, "distinct", 0].step_bytes - by_key[8, "base", 0].step_bytes == 8 * (
        by_key[8, "one", 0].step_bytes - by_key[8, "base", 0].step_bytes
    )
    assert on.engine.idle_ms() is None


def test_nothing_is_measured_when_the_time_is_over(on: Subject) -> None:
    assert timed(on, 0) == ([], [])


def test_the_mixes_of_a_batch() -> None:
    assert mixes_of(1).keys() == {"base", "one"}
    mixes = mixes_of(64)
    assert [len(mix) for mix in mixes.values()] == [64, 64, 64]
    assert [len(set(mix)) for mix in mixes.values()] == [1, 1, 64]
    assert "distinct" not in mixes_of(256)


def test_mixed_ranks_add_up_to_those_beside_them() -> None:
    mixes = rank_mixes(64)
    ranks = {name: [v.rank for v in mix if v is not None] for name, mix in mixes.items()}
    assert set(ranks["mixed"]) == {8, 16, 32, 64}
    assert sum(ranks["mixed"]) == sum(ranks["same sum"]) == sum(ranks["largest"]) / 2
    assert set(ranks["largest"]) == {64}
    for mix in ("mixed", "same sum", "largest"):
        assert len(set(mixes[mix])) == 64
    assert Version(64, 1) in set(mixes["mixed"]) & set(mixes["largest"])  # loaded once
    assert engine.arena_ranks() < sum(sum(of_mix) for of_mix in ranks.values()) + 64 * 16


def test_decode_figures() -> None:
    rows = [row("base", 0, 4.0), row("base", 1, 6.0), row("one", 0, 5.0), row("one", 1, 6.0)]
    rows += [row("distinct", 0, 8.0), row("distinct", 1, 6.0), row("base", 0, 3.0, batch=256)]
    figures = {figure.name: figure for figure in decode_figures(rows, RATE)}
    assert figures["decode 64, base: share of floor"].values == (0.75, 0.5)
    assert figures["decode 64, one: speed / base"].values == (0.8, 1.0)
    assert figures["decode 64, distinct: share of floor"].values == (0.375, 0.5)
    assert {name: figure.target for name, figure in figures.items()} == {
        "decode 64, base: share of floor": ">= 0.75",
        "decode 64, one: speed / base": ">= 0.92",
        "decode 64, distinct: share of floor": ">= 0.75",
        "decode 64, distinct: speed / base": "-",
        "decode 256, base: share of floor": "-",
    }
    assert not any("floor" in figure.name for figure in decode_figures(rows, None))


def test_prefill_figures() -> None:
    rows = [row("base", 0, 0, prefill_s=4.0), row("one", 0, 0, prefill_s=5.0)]
    rows.append(row("distinct", 0, 0, prefill_s=4.0))
    figures = prefill_figures(rows)
    assert [(f.values, f.target, f.verdict) for f in figures] == [
        ((0.8,), ">= 0.88", "below"),
        ((1.0,), ">= 0.88", "ok"),
    ]


def test_rank_figures() -> None:
    rows = [row("base", 0, 1.0), row("mixed", 0, 2.0), row("same sum", 0, 1.9), row("largest", 0, 3.0)]
    speed, adds, share = rank_figures(rows, RATE)
    assert (speed.values, speed.verdict) == ((0.95,), "ok")
    assert (adds.values, adds.verdict) == ((0.5,), "ok")
    assert share.values == (1.5,)
    follows_largest = [*rows[:1], row("mixed", 0, 2.9), *rows[2:]]
    assert [figure.verdict for figure in rank_figures(follows_largest, None)] == ["below", "above"]
    noise = [row("base", 0, 3.5), *rows[1:]]
    assert len(rank_figures(noise, None)) == 1


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "engine.json"
    options = "--shape tiny --rounds 1 --batches 4 --prompt 8 --output 3 --prefill 2x16 --json"
    monkeypatch.setattr(sys, "argv", ["engine", *options.split(), str(path)])
    engine.main()
    written = json.loads(path.read_text())
    assert (written["shape"], len(written["rows"])) == ("tiny", 3 + 3 + 4)
    assert "ranks mixed: speed / all 32" in capsys.readouterr().out
