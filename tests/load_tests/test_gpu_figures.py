from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from load_tests.gpu.figures import Deadline, Figure, alternate, finish, ratios, table


@dataclass(frozen=True)
class Row:
    seconds: float


def test_works_take_turns_there_and_back() -> None:
    calls: list[str] = []

    def work(name: str) -> int:
        calls.append(name)
        return len(calls)

    results = alternate({name: lambda name=name: work(name) for name in "abc"}, 3, Deadline(60))
    assert "".join(calls) == "abccbaabc"
    assert results == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}


def test_no_round_begins_after_the_deadline_but_the_first() -> None:
    over = Deadline(0)
    assert over.over
    assert alternate({"a": lambda: 1, "b": lambda: 2}, 3, over) == {"a": [1], "b": [2]}
    assert 0 < Deadline(60).left <= 60


def test_ratios_are_of_each_round_by_itself() -> None:
    assert ratios([1.0, 6.0], [2.0, 3.0]) == (0.5, 2.0)
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("values", "verdict"), [((0.1, 0.75, 9.0), "ok"), ((0.74, 0.75, 0.7), "below"), ((0.8,), "ok")]
)
def test_the_median_is_held_to_at_least(values: tuple[float, ...], verdict: str) -> None:
    assert Figure("share", values, at_least=0.75).verdict == verdict


def test_the_median_is_held_to_at_most() -> None:
    assert Figure("p99", (1.0, 1.3, 5.0), at_most=1.3).verdict == "ok"
    assert Figure("p99", (1.0, 1.31, 5.0), at_most=1.3).verdict == "above"
    assert Figure("p99", (1.0,)).verdict == ""


def test_the_table_says_median_spread_target_and_verdict() -> None:
    head, *lines = table(
        [
            Figure("a", (0.7, 0.9, 0.8), at_least=0.92),
            Figure("bb", (1.0, 2.0), at_most=1.6),
            Figure("c", (1234.5,)),
        ]
    ).splitlines()
    assert head.split() == ["median", "low", "high", "rounds", "target"]
    assert lines[0].split() == ["a", "0.800", "0.700", "0.900", "3", ">=", "0.92", "below"]
    assert lines[1].split() == ["bb", "1.500", "1.000", "2.000", "2", "<=", "1.60", "ok"]
    assert lines[2].split() == ["c", "1234", "1234", "1234", "1", "-"]


def test_everything_goes_to_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    finish([Figure("a", (0.7,), at_least=0.92)], [Row(1.5)], path, shape="tiny")
    written = json.loads(path.read_text())
    assert written["shape"] == "tiny"
    assert written["rows"] == [{"seconds": 1.5}]
    assert (written["figures"][0]["median"], written["figures"][0]["verdict"]) == (0.7, "below")
    assert "below" in capsys.readouterr().out


def test_without_figures_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    finish([], [], None)
    assert "out of time" in capsys.readouterr().out
