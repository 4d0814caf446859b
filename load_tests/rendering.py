"""Rows of cells for the terminal and for Markdown, JSON that people can read, empty plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

Rows = Sequence[Sequence[str]]  # the first one holds the headings


def as_rich(rows: Rows) -> Table:
    """For the terminal."""
    headings, *lines = rows
    table = Table()
    for heading in headings:
        table.add_column(escape(heading), overflow="fold")
    for line in lines:
        table.add_row(*map(escape, line))
    return table


def as_markdown(rows: Rows) -> str:
    """For a document."""
    headings, *lines = rows
    table = [headings, ["---"] * len(headings), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in table)


def write_json(path: Path, value: object) -> None:
    """Indented, one level a space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1))


def new_plot(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """Empty axes with a grid; `write_plot` saves them."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def write_plot(path: Path, figure: Figure) -> None:
    """A PNG, with a legend where anything has a label."""
    for axes in figure.axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=120)
