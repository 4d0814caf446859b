"""Figures beside their targets: rounds that take turns, medians with their spread, one table at the end."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Deadline:
    """When to begin nothing more: `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, 0 when it is over."""
        return max(0.0, self._end - time.monotonic())

    @property
    def over(self) -> bool:
        return self.left == 0


def alternate(works: Mapping[str, Callable[[], T]], rounds: int, deadline: Deadline) -> dict[str, list[T]]:
    """What each work gave in each round. They take turns, in the other direction every second round.

    All get equally many rounds: `rounds`, or fewer (never none) where the deadline comes first.
    """
    results: dict[str, list[T]] = {name: [] for name in works}
    for number in range(rounds):
        if number and deadline.over:
            break
        for name in works if number % 2 == 0 else reversed(list(works)):
            results[name].append(works[name]())
    return results


@dataclass(frozen=True)
class Figure:
    """One line of the table. At most one of the two targets is set."""

    name: str
    values: tuple[float, ...]  # one for each round
    at_least: float | None = None
    at_most: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def target(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:.2f}"
        return f"<= {self.at_most:.2f}" if self.at_most is not None else "-"

    @property
    def verdict(self) -> str:
        """`ok`, or on which side of its target the median is; nothing without a target."""
        if self.at_least is not None:
            return "ok" if self.median >= self.at_least else "below"
        if self.at_most is not None:
            return "ok" if self.median <= self.at_most else "above"
        return ""


def ratios(over: Sequence[float], under: Sequence[float]) -> tuple[float, ...]:
    """Of each round by itself, so that what slows a whole round down cancels out."""
    return tuple(a / b for a, b in zip(over, under, strict=True))


def table(figures: Sequence[Figure]) -> str:
    """One line for each figure: median, lowest and highest round, how many, target and verdict."""
    width = max(len(figure.name) for figure in figures)
    lines = [f"{'':{width}}{'median':>10}{'low':>9}{'high':>9}{'rounds':>8}{'target':>10}"]
    for figure in figures:
        low, high = min(figure.values), max(figure.values)
        numbers = f"{_number(figure.median):>10}{_number(low):>9}{_number(high):>9}{len(figure.values):>8}"
        lines.append(f"{figure.name:{width}}{numbers}{figure.target:>10}  {figure.verdict}".rstrip())
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def finish(figures: Sequence[Figure], rows: Iterable[Any], path: Path | None, **about: object) -> None:
    """Print the table and, with a `path`, write everything there: `rows` are dataclasses."""
    print(table(figures) if figures else "no figures: out of time", flush=True)
    if path is not None:
        judged = [asdict(f) | {"median": f.median, "verdict": f.verdict} for f in figures]
        dicts = [asdict(row) for row in rows]
        path.write_text(json.dumps({**about, "figures": judged, "rows": dicts}, indent=1))
