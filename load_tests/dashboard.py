"""A Grafana dashboard drawn without Grafana: its queries, put to Prometheus, as lines.

Shows that a dashboard has live data where there is no Grafana. Tables and single values are lines too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLUMNS = 3
_POINTS = 150  # of each line
_VARIABLES = {"$__rate_interval": "1m", "$instance": ".*"}


class Query(msgspec.Struct, frozen=True):
    expr: str
    legend: str  # with {{label}} in it, as Grafana has it


class Panel(msgspec.Struct, frozen=True):
    """One picture of a dashboard."""

    title: str
    unit: str
    queries: list[Query]


def read_panels(dashboard: Path) -> list[Panel]:
    """Its panels in order, without the headings between them; variables stand for everything."""
    panels = msgspec.json.decode(dashboard.read_bytes())["panels"]
    return [
        Panel(panel["title"], panel["fieldConfig"]["defaults"]["unit"], [*_queries(panel)])
        for panel in panels
        if panel["type"] != "row"
    ]


def _queries(panel: dict[str, Any]) -> Iterator[Query]:
    for target in panel["targets"]:
        expr = target["expr"]
        for name, value in _VARIABLES.items():
            expr = expr.replace(name, value)
        yield Query(expr, target["legendFormat"])


def draw(dashboard: Path, prometheus: str, minutes: float, out: Path) -> list[str]:
    """Writes a PNG of the last minutes; returns the titles of panels that had no data.

    Raises httpx.HTTPStatusError where Prometheus refuses a query.
    """
    panels, empty = read_panels(dashboard), []
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(5.2 * _COLUMNS, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    with httpx.Client(base_url=prometheus, timeout=30) as client:
        for axes, panel in zip(grid, panels, strict=False):
            if not _draw_panel(client, axes, panel, minutes):
                empty.append(panel.title)
    for axes in list(grid)[len(panels) :]:
        axes.remove()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)
    return empty


def _draw_panel(client: httpx.Client, axes: Axes, panel: Panel, minutes: float) -> bool:
    """Whether there was anything to draw."""
    now, lines = time.time(), 0
    for query in panel.queries:
        for labels, points in _ask(client, query.expr, now - 60 * minutes, now):
            lines += 1
            times = [(at - now) / 60 for at, _ in points]
            axes.plot(times, [float(value) for _, value in points], label=_legend(query.legend, labels))
    axes.set_title(f"{panel.title} [{panel.unit}]", fontsize=9)
    axes.set_xlim(-minutes, 0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=7)
    if any(axes.get_legend_handles_labels()[1]):
        axes.legend(fontsize=6)
    return lines > 0


def _ask(client: httpx.Client, expr: str, start: float, end: float) -> Iterator[tuple[dict[str, str], Any]]:
    step = max(1.0, (end - start) / _POINTS)
    answer = client.get(
        "/api/v1/query_range", params={"query": expr, "start": start, "end": end, "step": step}
    ).raise_for_status()
    for series in answer.json()["data"]["result"]:
        yield series["metric"], series["values"]


def _legend(pattern: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda name: labels.get(name[1], ""), pattern)
