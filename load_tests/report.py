"""Figures, tables and plots of one run, or of several side by side.

Fairness follows Jain, Chiu and Hawe 1984 (DEC-TR-301): (sum x)^2 / (n sum x^2) over the adapters' means is
1 when all fare alike and 1/n when one adapter takes everything.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter
from numpy.typing import NDArray
from rich.table import Table

from load_tests.client import Record
from load_tests.rendering import as_markdown, as_rich, new_plot, write_json, write_plot
from load_tests.runner import RunResult


class Spread(msgspec.Struct, frozen=True):
    """A distribution of seconds. Percentiles interpolate linearly between neighbours."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None when there is no value."""
        array = np.fromiter(values, np.float64)
        if not array.size:
            return None
        p50, p90, p95, p99 = np.percentile(array, (50, 90, 95, 99)).tolist()
        return cls(float(array.mean()), p50, p90, p95, p99, float(array.max()))


class AdapterFigures(msgspec.Struct, frozen=True):
    """How the requests of one adapter fared; only answered ones count in the times."""

    adapter: str | None  # None: the base model
    rank: int  # popularity; 0 = the base model
    requests: int
    errors: int
    ttft_mean_s: float | None
    ttft_p95_s: float | None
    slowdown_mean: float | None  # see `slowdowns`


class Fairness(msgspec.Struct, frozen=True):
    """Over the adapters that got answers (the base model is left out)."""

    adapters: int
    jain_ttft: float  # Jain index of the adapters' mean TTFT
    jain_slowdown: float  # Jain index of the adapters' mean slowdown
    worst_adapter: str  # by TTFT p95
    worst_ttft_p95_s: float
    median_ttft_p95_s: float  # median over the adapters of their TTFT p95
    worst_over_median: float


class Report(msgspec.Struct, frozen=True):
    """Every figure of one run. Times in seconds; only answered requests count in them."""

    label: str
    url: str
    mode: str
    started_at: str
    interrupted: bool
    planned: int
    sent: int
    answered: int
    errors: dict[str, int]  # by kind, most frequent first
    wrong_answers: int | None  # None: not checked
    unverified_answers: int | None
    wall_s: float  # from the first request sent to the last one ended
    requests_per_s: float  # answered
    output_tokens: int  # of answered requests
    output_tokens_per_s: float
    ttft: Spread | None  # time to first token
    inter_token: Spread | None  # between one token and the next, over all tokens of all requests
    time_per_token: Spread | None  # a request's mean time per token after its first
    end_to_end: Spread | None
    send_lag: Spread | None  # how late the client itself was; large = the client is the bottleneck
    fairness: Fairness | None
    adapters: list[AdapterFigures]  # most popular first


def jain_index(values: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2); 1 when there is nothing to tell apart."""
    array = np.asarray(values, np.float64)
    squares = float((array**2).sum())
    return float(array.sum()) ** 2 / (array.size * squares) if squares else 1.0


def time_per_token(record: Record) -> float | None:
    """Mean seconds per token after the first; None for a single token."""
    if record.ttft_s is None or record.output_tokens < 2:
        return None
    return sum(record.gaps_s) / (record.output_tokens - 1)


def slowdowns(answered: Sequence[Record]) -> list[float]:
    """Of each request: its end-to-end time over that of an ideal request with as many tokens.

    The ideal one has the run's shortest TTFT and shortest time per token. Unlike end-to-end time itself, this
    does not call an adapter slow for being asked for long answers.
    """
    best_ttft = min((record.ttft_s for record in answered if record.ttft_s is not None), default=0.0)
    paces = [pace for record in answered if (pace := time_per_token(record)) is not None]
    best_pace = min(paces, default=0.0)
    ideals = [best_ttft + (record.output_tokens - 1) * best_pace for record in answered]
    return [
        record.e2e_s / ideal if ideal > 0 else 1.0 for record, ideal in zip(answered, ideals, strict=True)
    ]


def summarise(result: RunResult) -> Report:
    """The figures of one run."""
    records = result.records
    answered = [record for record in records if record.error is None]
    failures = Counter(record.error.partition(":")[0] for record in records if record.error is not None)
    begin = min((record.sent_s for record in records), default=0.0)
    wall_s = max((record.start_s + record.e2e_s for record in records), default=0.0) - begin
    tokens = sum(record.output_tokens for record in answered)
    per_adapter = _per_adapter(records, answered)
    check = result.check
    return Report(
        label=result.label,
        url=result.url,
        mode=result.mode,
        started_at=result.started_at,
        interrupted=result.interrupted,
        planned=result.planned,
        sent=len(records),
        answered=len(answered),
        errors=dict(failures.most_common()),
        wrong_answers=len(check.wrong) if check else None,
        unverified_answers=len(check.unverified) if check else None,
        wall_s=wall_s,
        requests_per_s=len(answered) / wall_s if wall_s > 0 else 0.0,
        output_tokens=tokens,
        output_tokens_per_s=tokens / wall_s if wall_s > 0 else 0.0,
        ttft=Spread.of(_ttfts(answered)),
        inter_token=Spread.of(gap for record in answered for gap in record.gaps_s),
        time_per_token=Spread.of(pace for record in answered if (pace := time_per_token(record)) is not None),
        end_to_end=Spread.of(record.e2e_s for record in answered),
        send_lag=Spread.of(record.sent_s - record.start_s for record in records),
        fairness=_fairness(per_adapter),
        adapters=per_adapter,
    )


def _ttfts(records: Iterable[Record]) -> list[float]:
    return [record.ttft_s for record in records if record.ttft_s is not None]


def _per_adapter(records: Sequence[Record], answered: Sequence[Record]) -> list[AdapterFigures]:
    sent: dict[tuple[int, str | None], list[Record]] = defaultdict(list)
    slow: dict[str | None, list[float]] = defaultdict(list)
    for record in records:
        sent[record.rank, record.adapter].append(record)
    for record, slowdown in zip(answered, slowdowns(answered), strict=True):
        slow[record.adapter].append(slowdown)
    figures = []
    for (rank, adapter), mine in sorted(sent.items(), key=lambda item: item[0][0]):
        ttft = Spread.of(_ttfts(record for record in mine if record.error is None))
        figures.append(
            AdapterFigures(
                adapter=adapter,
                rank=rank,
                requests=len(mine),
                errors=sum(record.error is not None for record in mine),
                ttft_mean_s=ttft.mean if ttft else None,
                ttft_p95_s=ttft.p95 if ttft else None,
                slowdown_mean=float(np.mean(slow[adapter])) if slow[adapter] else None,
            )
        )
    return figures


def _fairness(figures: Iterable[AdapterFigures]) -> Fairness | None:
    """None when no adapter got an answer."""
    means, p95s, slow = {}, {}, []
    for one in figures:
        if one.adapter is None or one.ttft_mean_s is None or one.ttft_p95_s is None:
            continue
        means[one.adapter], p95s[one.adapter] = one.ttft_mean_s, one.ttft_p95_s
        if one.slowdown_mean is not None:
            slow.append(one.slowdown_mean)
    if not means:
        return None
    worst = max(p95s, key=p95s.__getitem__)
    median = float(np.median(list(p95s.values())))
    return Fairness(
        adapters=len(means),
        jain_ttft=jain_index(list(means.values())),
        jain_slowdown=jain_index(slow),
        worst_adapter=worst,
        worst_ttft_p95_s=p95s[worst],
        median_ttft_p95_s=median,
        worst_over_median=p95s[worst] / median if median > 0 else 1.0,
    )


# tables: the same rows for the terminal and for Markdown, one column for each run


def _milliseconds(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return " / ".join(f"{1000 * value:.4g}" for value in (spread.p50, spread.p90, spread.p95, spread.p99))


def _unfairness(report: Report) -> str:
    fair = report.fairness
    return f"{fair.worst_over_median:.2f} ({fair.worst_adapter})" if fair else "-"


def _errors(report: Report) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in report.errors.items()) or "0"


def _wrong(report: Report) -> str:
    if report.wrong_answers is None:
        return "not checked"
    return f"{report.wrong_answers} ({report.unverified_answers} unverified)"


_ROWS: dict[str, Callable[[Report], str]] = {
    "mode": lambda r: r.mode + (", interrupted" if r.interrupted else ""),
    "answered / planned": lambda r: f"{r.answered} / {r.planned}",
    "errors": _errors,
    "wrong answers": _wrong,
    "duration, s": lambda r: f"{r.wall_s:.2f}",
    "requests/s": lambda r: f"{r.requests_per_s:.2f}",
    "output tokens/s": lambda r: f"{r.output_tokens_per_s:.1f}",
    "TTFT p50 / p90 / p95 / p99, ms": lambda r: _milliseconds(r.ttft),
    "inter-token p50 / p90 / p95 / p99, ms": lambda r: _milliseconds(r.inter_token),
    "time per token p50 / p90 / p95 / p99, ms": lambda r: _milliseconds(r.time_per_token),
    "end to end p50 / p90 / p95 / p99, ms": lambda r: _milliseconds(r.end_to_end),
    "client send lag p99, ms": lambda r: f"{1000 * r.send_lag.p99:.3g}" if r.send_lag else "-",
    "adapters answered": lambda r: str(r.fairness.adapters if r.fairness else 0),
    "Jain index of mean TTFT": lambda r: f"{r.fairness.jain_ttft:.3f}" if r.fairness else "-",
    "Jain index of mean slowdown": lambda r: f"{r.fairness.jain_slowdown:.3f}" if r.fairness else "-",
    "worst / median adapter's TTFT p95": _unfairness,
}


def _cells(reports: Sequence[Report]) -> list[list[str]]:
    headings = ["", *(report.label for report in reports)]
    return [headings, *([name, *map(cell, reports)] for name, cell in _ROWS.items())]


def rich_table(reports: Sequence[Report]) -> Table:
    """One column for each run, for the terminal."""
    return as_rich(_cells(reports))


def markdown_table(reports: Sequence[Report]) -> str:
    """One column for each run, for a document."""
    return as_markdown(_cells(reports))


# plots: one line or set of points for each run


def _plot_ttft(axes: Axes, result: RunResult, report: Report) -> None:
    _cdf(axes, [1000 * ttft for ttft in _ttfts(r for r in result.records if r.error is None)], report.label)


def _plot_inter_token(axes: Axes, result: RunResult, report: Report) -> None:
    gaps = [1000 * gap for record in result.records if record.error is None for gap in record.gaps_s]
    _cdf(axes, gaps, report.label)


def _cdf(axes: Axes, values: Sequence[float], label: str) -> None:
    if values:
        axes.ecdf(values, label=label)
    _log_x(axes)  # zeros (tokens of one chunk) show as the height at which the curve begins
    axes.set_ylim(0, 1.02)


def _log_x(axes: Axes) -> None:
    axes.set_xscale("log", nonpositive="mask")
    axes.xaxis.set_major_formatter(LogFormatter())  # 40 and 100, not powers of ten
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def token_times(result: RunResult) -> NDArray[np.float64]:
    """When each output token came, seconds since the run's first request was sent; ascending."""
    begin = min((record.sent_s for record in result.records), default=0.0)
    times = [
        record.start_s + record.ttft_s - begin + np.concatenate([[0.0], np.cumsum(record.gaps_s)])
        for record in result.records
        if record.ttft_s is not None
    ]
    return np.sort(np.concatenate(times)) if times else np.zeros(0)


def _plot_throughput(axes: Axes, result: RunResult, report: Report) -> None:
    times = token_times(result)
    if not times.size or report.wall_s <= 0:
        return
    bins = min(60, max(10, len(times) // 50))
    counts, edges = np.histogram(times, bins=bins, range=(0, report.wall_s))
    axes.stairs(counts / np.diff(edges), edges, label=report.label)
    axes.set_ylim(bottom=0)


def _plot_by_rank(axes: Axes, result: RunResult, report: Report) -> None:
    del result
    ranks, means, p95s = [], [], []
    for one in report.adapters:
        if one.rank and one.ttft_mean_s is not None and one.ttft_p95_s is not None:
            ranks.append(one.rank)
            means.append(1000 * one.ttft_mean_s)
            p95s.append(1000 * one.ttft_p95_s)
    points = axes.plot(ranks, means, "o", markersize=4, label=f"{report.label}: mean")
    axes.plot(ranks, p95s, "_", color=points[0].get_color(), alpha=0.7, label=f"{report.label}: p95")
    _log_x(axes)
    axes.set_ylim(bottom=0)


_PLOTS: dict[str, tuple[Callable[[Axes, RunResult, Report], None], str, str, str]] = {
    "ttft_cdf": (_plot_ttft, "Time to first token", "TTFT, ms", "share of requests"),
    "inter_token_cdf": (_plot_inter_token, "Inter-token latency", "between tokens, ms", "share of tokens"),
    "throughput": (_plot_throughput, "Throughput over time", "since the start, s", "output tokens/s"),
    "ttft_by_rank": (
        _plot_by_rank,
        "Time to first token by adapter popularity",
        "popularity rank of the adapter (1 = most asked for)",
        "TTFT, ms",
    ),
}


def write_plots(out: Path, results: Sequence[RunResult], reports: Sequence[Report]) -> list[Path]:
    """Write the four PNG files; their paths."""
    paths = []
    for name, (plot, *titles) in _PLOTS.items():
        figure, axes = new_plot(*titles)
        for result, report in zip(results, reports, strict=True):
            plot(axes, result, report)
        paths.append(out / f"{name}.png")
        write_plot(paths[-1], figure)
    return paths


def write_report(out: Path, results: Sequence[RunResult]) -> list[Report]:
    """Write report.json, report.md and the plots of `results` into `out`."""
    reports = [summarise(result) for result in results]
    write_json(out / "report.json", {"runs": reports})
    (out / "report.md").write_text(markdown_table(reports))
    write_plots(out, results, reports)
    return reports
