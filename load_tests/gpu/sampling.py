"""What sampling costs: decode steps of requests with temperature 0.8 and top-p 0.9 against greedy ones.

Base model only. The logits of random weights are flat, so nearly the whole vocabulary is in the nucleus: the
most that top-p can have to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from load_tests.gpu.context import Context
from load_tests.gpu.engine import time_steps
from load_tests.gpu.figures import Figure, alternate, ratios
from load_tests.gpu.subject import Subject
from load_tests.gpu.workload import Workload

WAYS: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
}


@dataclass(frozen=True)
class Row:
    """One round of one way to sample."""

    way: str
    round: int
    step_s: float  # median decode step


def once(subject: Subject, way: str, work: Workload, number: int) -> Row:
    _, step = time_steps(subject, [None] * work.sequences, work.prompt, work.output, **WAYS[way])
    return Row(way, number, step)


def figures_of(rows: dict[str, list[Row]]) -> list[Figure]:
    """Of the ways that draw, the times against greedy."""
    steps = {way: [row.step_s for row in of_way] for way, of_way in rows.items()}
    return [
        Figure(
            f"{way}: step / greedy",
            ratios(of_way, steps["greedy"]),
            at_most=1.05 if way == "top-p" else None,
        )
        for way, of_way in steps.items()
        if way != "greedy"
    ]


def measure(context: Context) -> None:
    """On the shared engine."""
    on, work, results = context.subject(), context.workload, context.results
    results.add(sequences=work.sequences)
    for sampling in WAYS.values():  # compiles what each needs
        time_steps(on, [None] * work.sequences, work.prompt, 2, **sampling)
    works = {way: partial(once, on, way, work) for way in WAYS}
    results.add(figures=figures_of(alternate(works, work.rounds, context.deadline, results)))
