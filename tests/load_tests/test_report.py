from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from load_tests.client import Record
from load_tests.report import (
    jain_index,
    markdown_table,
    slowdowns,
    summarise,
    token_times,
    write_report,
)
from load_tests.runner import CheckResult, RunResult, WrongAnswer


def record(number: int, adapter: str | None, rank: int, start_s: float, **fields: Any) -> Record:
    return Record(id=number, adapter=adapter, rank=rank, start_s=start_s, sent_s=start_s, **fields)


RECORDS = [
    record(0, "a", 1, 0.0, ttft_s=1.0, gaps_s=[0.5, 0.5], output_tokens=3, e2e_s=2.0),
    record(1, "a", 1, 1.0, ttft_s=3.0, gaps_s=[1.0], output_tokens=2, e2e_s=4.0),
    record(2, "b", 2, 2.0, ttft_s=6.0, gaps_s=[0.0, 2.0], output_tokens=3, e2e_s=8.0),
    record(3, None, 0, 2.0, ttft_s=2.0, gaps_s=[], output_tokens=1, e2e_s=2.0),
    record(4, "b", 2, 3.0, ttft_s=0.5, gaps_s=[0.5], output_tokens=2, e2e_s=1.0, error="HTTP 503: busy"),
    record(5, "c", 3, 3.0, e2e_s=1.0, error="HTTP 503: full"),
    record(6, "a", 1, 3.0, e2e_s=1.0, error="connection: ServerDisconnectedError"),
]


def result(records: list[Record] = RECORDS, **fields: Any) -> RunResult:
    defaults: dict[str, Any] = {
        "label": "hand made",
        "url": "http://host",
        "mode": "open loop",
        "started_at": "2026-01-01T00:00:00+00:00",
        "planned": 8,
        "interrupted": False,
    }
    return RunResult(records=records, **(defaults | fields))


def test_totals() -> None:
    report = summarise(result())
    assert (report.planned, report.sent, report.answered) == (8, 7, 4)
    assert report.errors == {"HTTP 503": 2, "connection": 1}
    assert report.wall_s == 10.0  # request 2 ended last, at 2 + 8
    assert report.requests_per_s == 0.4
    assert (report.output_tokens, report.output_tokens_per_s) == (9, 0.9)
    assert report.wrong_answers is None


def test_percentiles_are_of_answered_requests_only() -> None:
    report = summarise(result())
    ttft = report.ttft
    assert ttft is not None  # of 1, 2, 3, 6
    assert (ttft.mean, ttft.p50, ttft.max) == (3.0, 2.5, 6.0)
    assert (ttft.p90, ttft.p95, ttft.p99) == pytest.approx((5.1, 5.55, 5.91))
    gaps = report.inter_token
    assert gaps is not None  # of 0, 0.5, 0.5, 1, 2
    assert (gaps.mean, gaps.p50, gaps.p90) == pytest.approx((0.8, 0.5, 1.6))
    pace = report.time_per_token
    assert pace is not None  # of 0.5, 1, 1
    assert (pace.p50, pace.mean) == pytest.approx((1.0, 2.5 / 3))
    assert report.end_to_end is not None
    assert report.end_to_end.p50 == 3.0  # of 2, 2, 4, 8


def test_slowdown_is_against_an_ideal_request_of_the_same_length() -> None:
    answered = [one for one in RECORDS if one.error is None]
    # best TTFT 1 s, best pace 0.5 s a token: ideals are 2, 1.5, 2 and 1 s
    assert slowdowns(answered) == pytest.approx([1.0, 4 / 1.5, 4.0, 2.0])


def test_fairness_is_over_adapters_and_leaves_the_base_model_out() -> None:
    report = summarise(result())
    fair = report.fairness
    assert fair is not None
    assert fair.adapters == 2
    assert fair.jain_ttft == pytest.approx((2 + 6) ** 2 / (2 * (4 + 36)))  # mean TTFT: a 2 s, b 6 s
    slow_a = (1 + 4 / 1.5) / 2
    assert fair.jain_slowdown == pytest.approx((slow_a + 4) ** 2 / (2 * (slow_a**2 + 16)))
    assert (fair.worst_adapter, fair.worst_ttft_p95_s) == ("b", 6.0)
    assert fair.median_ttft_p95_s == pytest.approx((2.9 + 6) / 2)
    assert fair.worst_over_median == pytest.approx(6 / 4.45)


def test_adapters_are_listed_by_popularity() -> None:
    base, a, b, c = summarise(result()).adapters
    assert [one.adapter for one in (base, a, b, c)] == [None, "a", "b", "c"]
    assert (a.requests, a.errors, a.ttft_mean_s) == (3, 1, 2.0)
    assert (b.requests, b.errors) == (2, 1)
    assert (c.requests, c.errors, c.ttft_mean_s, c.slowdown_mean) == (1, 1, None, None)


@pytest.mark.parametrize(
    ("values", "index"), [([3.0, 3.0, 3.0], 1.0), ([1.0, 0.0, 0.0, 0.0], 0.25), ([1.0, 2.0], 0.9), ([], 1.0)]
)
def test_jain_index(values: list[float], index: float) -> None:
    assert jain_index(values) == pytest.approx(index)


def test_token_times_lie_on_the_clock_of_the_run() -> None:
    late = [record(0, "a", 1, 5.0, ttft_s=1.0, gaps_s=[0.5, 0.25], output_tokens=3, e2e_s=2.0)]
    early = [record(1, "a", 1, 4.0, ttft_s=2.5, gaps_s=[], output_tokens=1, e2e_s=3.0)]
    assert token_times(result(late + early)).tolist() == [2.0, 2.5, 2.5, 2.75]


def test_table_shows_runs_side_by_side() -> None:
    check = CheckResult("recorded answers", 4, [WrongAnswer(1, "a", 0)], [])
    table = markdown_table([summarise(result()), summarise(result(label="second", check=check))])
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    cells = {row[0]: row[1:] for row in rows}
    assert cells[""] == ["hand made", "second"]
    assert cells["answered / planned"] == ["4 / 8"] * 2
    assert cells["errors"][0] == "2 x HTTP 503, 1 x connection"
    assert cells["wrong answers"] == ["not checked", "1 (0 unverified)"]
    assert cells["TTFT p50 / p90 / p95 / p99, ms"][0] == "2500 / 5100 / 5550 / 5910"
    assert cells["worst / median adapter's TTFT p95"][0] == "1.35 (b)"


def test_a_run_without_answers_still_has_a_report(tmp_path: Path) -> None:
    for records in ([], RECORDS[4:]):
        (report,) = write_report(tmp_path, [result(records)])
        assert (report.answered, report.ttft, report.fairness, report.requests_per_s) == (0, None, None, 0)


def test_report_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    records = [
        record(
            number,
            f"adapter-{number % 20:03d}",
            number % 20 + 1,
            number / 20,
            ttft_s=float(rng.gamma(2, 0.05)),
            gaps_s=rng.gamma(4, 0.01, 30).tolist(),
            output_tokens=31,
            e2e_s=2.0,
        )
        for number in range(200)
    ]
    write_report(tmp_path / "out", [result(records, label="one"), result(records[:100], label="two")])
    runs = json.loads((tmp_path / "out" / "report.json").read_text())["runs"]
    assert [run["label"] for run in runs] == ["one", "two"]
    assert runs[0]["output_tokens"] == 6200
    assert (tmp_path / "out" / "report.md").read_text().startswith("|  | one | two |")
    plots = sorted((tmp_path / "out").glob("*.png"))
    assert [plot.stem for plot in plots] == ["inter_token_cdf", "throughput", "ttft_by_rank", "ttft_cdf"]
    for plot in plots:
        head = plot.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        assert struct.unpack(">II", head[16:24]) == (960, 540)
        assert plot.stat().st_size > 10_000  # not blank
