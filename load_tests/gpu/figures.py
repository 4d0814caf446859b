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


class Results:
    """What one part measured. Each addition is on disk at once: a part that is killed leaves what it had.

    `NAME.json` holds the figures, the rows (dataclasses) and `about`; `NAME.txt` what people read. Without a
    folder nothing is written.
    """

    def __init__(self, name: str, folder: Path | None = None, **about: object) -> None:
        self.figures: list[Figure] = []
        self.rows: list[Any] = []
        self.about = about
        self._name, self._folder = name, folder
        self._lines: list[str] = []

    def say(self, text: str) -> None:
        """Print, and keep for the reader."""
        print(text, flush=True)
        self._lines.append(text)
        self._save()

    def add(self, rows: Iterable[Any] = (), figures: Iterable[Figure] = (), **about: object) -> None:
        self.rows += rows
        self.figures += figures
        self.about |= about
        self._save()

    @property
    def text(self) -> str:
        """What was said, and the table of the figures so far."""
        return "\n".join([*self._lines, *([table(self.figures)] if self.figures else [])])

    def _save(self) -> None:
        if self._folder is None:
            return
        judged = [
            asdict(figure) | {"median": figure.median, "verdict": figure.verdict} for figure in self.figures
        ]
        found = {**self.about, "figures": judged, "rows": [asdict(row) for row in self.rows]}
        for ending, text in (("json", json.dumps(found, indent=1)), ("txt", self.text + "\n")):
            partial = self._folder / f"{self._name}.{ending}.part"
            partial.write_text(text)
            partial.replace(self._folder / f"{self._name}.{ending}")


def alternate(
    works: Mapping[str, Callable[[int], T]], rounds: int, deadline: Deadline, results: Results
) -> dict[str, list[T]]:
    """The row that each work gave in each round, which it is told; in the results as soon as it is there.

    They take turns, in the other direction every second round. All get equally many rounds: `rounds`, or
    fewer (never none) where the deadline comes first.
    """
    rows: dict[str, list[T]] = {name: [] for name in works}
    for number in range(rounds):
        if number and deadline.over:
            break
        for name in works if number % 2 == 0 else reversed(list(works)):
            row = works[name](number)
            results.add([row])
            rows[name].append(row)
    return rows
