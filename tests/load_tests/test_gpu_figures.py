from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from load_tests.gpu.figures import Deadline, Figure, Results, alternate, ratios, table


@dataclass(frozen=True)
class Row:
    seconds: float


def test_works_take_turns_there_and_back() -> None:
    results = Results("turns")
    works = {name: lambda number, name=name: f"{name}{number}" for name in "abc"}
    rows = alternate(works, 3, Deadline(60), results)
    assert results.rows == ["a0", "b0", "c0", "c1", "b1", "a1", "a2", "b2", "c2"]
    assert rows == {name: [f"{name}{number}" for number in range(3)] for name in "abc"}


def test_no_round_begins_after_the_deadline_but_the_first() -> None:
    over = Deadline(0)
    assert over.over
    works = {"a": lambda number: 1, "b": lambda number: 2}
    assert alternate(works, 3, over, Results("late")) == {"a": [1], "b": [2]}
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


def test_everything_is_on_disk_as_soon_as_it_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Results("part", tmp_path, shape="tiny")
    results.say("before the first figure")
    assert (tmp_path / "part.txt").read_text() == "before the first figure\n"
    results.add([Row(1.5)], copy_rate=3.0)
    assert json.loads((tmp_path / "part.json").read_text()) == {
        "shape": "tiny",
        "copy_rate": 3.0,
        "figures": [],
        "rows": [{"seconds": 1.5}],
    }
    results.add([Row(2.5)], [Figure("a", (0.7,), at_least=0.92)])
    written = json.loads((tmp_path / "part.json").read_text())
    assert written["rows"] == [{"seconds": 1.5}, {"seconds": 2.5}]
    assert (written["figures"][0]["median"], written["figures"][0]["verdict"]) == (0.7, "below")
    assert (tmp_path / "part.txt").read_text() == results.text + "\n"
    assert "below" in results.text
    assert capsys.readouterr().out == "before the first figure\n"
    assert {path.name for path in tmp_path.iterdir()} == {"part.json", "part.txt"}


def test_a_row_is_on_disk_before_the_next_is_measured(tmp_path: Path) -> None:
    """A part that is killed leaves its figures."""

    def work(number: int) -> Row:
        path = tmp_path / "part.json"
        seen.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        return Row(number)

    seen: list[int] = []
    alternate({"a": work, "b": work}, 2, Deadline(60), Results("part", tmp_path))
    assert seen == [0, 1, 2, 3]
