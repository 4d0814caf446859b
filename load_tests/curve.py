"""A curve over a number of adapters: what was measured, round by round, and how it is written and drawn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from matplotlib.ticker import ScalarFormatter

from load_tests.floor import Machine, StepBytes
from load_tests.rendering import as_markdown, new_plot, write_json, write_plot


class Sample(msgspec.Struct, frozen=True):
    """One point in one round. Times in seconds; of answered requests only."""

    adapters: int  # the curve's x: distinct ones in the batch, or registered ones
    round: int
    tokens_per_s: float  # output, over the whole run, prefill included
    ttft_p50_s: float
    ttft_p95_s: float
    inter_token_p50_s: float
    failed: int  # requests without a whole answer
    adapter_loads: int  # copies into the arena meanwhile
    ready_s: float  # of the server, from its start


class Floor(msgspec.Struct, frozen=True):
    """The least time of a decode step at one point, and the speed that it and the prompts allow."""

    bytes: StepBytes
    step_s: float
    tokens_per_s: float  # output, of whole batches, prefill included


class Curve(msgspec.Struct, frozen=True):
    """All that one command measured."""

    title: str
    x_label: str
    started_at: str  # ISO 8601, UTC
    settings: dict[str, Any]  # what was asked for
    samples: list[Sample]
    machine: Machine | None = None  # measured
    floors: dict[int, Floor] = {}  # by number of adapters

    @property
    def points(self) -> list[int]:
        """The numbers of adapters, rising."""
        return sorted({sample.adapters for sample in self.samples})

    @property
    def failed(self) -> int:
        """How many requests had no whole answer."""
        return sum(sample.failed for sample in self.samples)

    def over_rounds(self, adapters: int, figure: Callable[[Sample], float]) -> Spread:
        """Median and extremes of a figure of one point."""
        values = [figure(sample) for sample in self.samples if sample.adapters == adapters]
        return Spread(statistics.median(values), min(values), max(values))


class Spread(msgspec.Struct, frozen=True):
    """Over the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return _number(self.median)
        return f"{_number(self.median)} [{_number(self.low)}-{_number(self.high)}]"


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


Lines = dict[str, Callable[[Sample], float]]  # label -> figure

_FIGURES: Lines = {
    "output tokens/s": lambda sample: sample.tokens_per_s,
    "inter-token p50, ms": lambda sample: 1000 * sample.inter_token_p50_s,
    "TTFT p50, ms": lambda sample: 1000 * sample.ttft_p50_s,
    "TTFT p95, ms": lambda sample: 1000 * sample.ttft_p95_s,
    "copies into the arena": lambda sample: sample.adapter_loads,
    "ready after, s": lambda sample: sample.ready_s,
    "failed": lambda sample: sample.failed,
}


def rows(curve: Curve) -> list[list[str]]:
    """One column for each point, medians over the rounds [min-max]; then the floor, where there is one."""
    table = [[curve.x_label, *map(str, curve.points)]]
    for name, figure in _FIGURES.items():
        table.append([name, *(str(curve.over_rounds(adapters, figure)) for adapters in curve.points)])
    if curve.floors:
        floors = [curve.floors[adapters] for adapters in curve.points]
        speeds = [
            curve.over_rounds(adapters, _FIGURES["output tokens/s"]).median for adapters in curve.points
        ]
        shares = [speed / floor.tokens_per_s for speed, floor in zip(speeds, floors, strict=True)]
        table += [
            ["read by a step, MB", *(_number(floor.bytes.total / 1e6) for floor in floors)],
            ["floor of a step, ms", *(_number(1000 * floor.step_s) for floor in floors)],
            ["floor, tokens/s", *(_number(floor.tokens_per_s) for floor in floors)],
            ["share of the floor", *(f"{share:.0%}" for share in shares)],
        ]
    return table


def write_curve(out: Path, curve: Curve) -> None:
    """curve.json, curve.md, tokens_per_s.png and ttft.png in `out`."""
    write_json(out / "curve.json", curve)
    (out / "curve.md").write_text(as_markdown(rows(curve)))
    speed = {"median of the rounds, min to max": _FIGURES["output tokens/s"]}
    _plot(out / "tokens_per_s.png", curve, "output tokens/s", speed, floor=True)
    ttft = {"p50": _FIGURES["TTFT p50, ms"], "p95": _FIGURES["TTFT p95, ms"]}
    _plot(out / "ttft.png", curve, "time to first token, ms", ttft)


def _plot(path: Path, curve: Curve, y_label: str, lines: Lines, *, floor: bool = False) -> None:
    figure, axes = new_plot(curve.title, curve.x_label, y_label)
    for label, of_sample in lines.items():
        spreads = [curve.over_rounds(adapters, of_sample) for adapters in curve.points]
        medians = [spread.median for spread in spreads]
        axes.errorbar(curve.points, medians, _bars(spreads), fmt="o-", capsize=3, label=label)
    if floor and curve.floors:
        floors = [curve.floors[adapters].tokens_per_s for adapters in curve.points]
        axes.plot(curve.points, floors, "k--", label=_floor_label(curve.machine))
    axes.set_xscale("log", base=2 if max(curve.points) <= 256 else 10)
    axes.set_xticks(curve.points)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    write_plot(path, figure)


def _floor_label(machine: Machine | None) -> str:
    if machine is None:
        return "floor"
    return f"floor at {machine.read_rate / 1e9:.0f} GB/s, {machine.multiply_rate / 1e9:.0f} GFLOP/s"


def _bars(spreads: Sequence[Spread]) -> list[list[float]]:
    """Lengths of the error bars below and above, as matplotlib wants them."""
    return [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
