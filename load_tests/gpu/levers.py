"""Decode steps with each of `--cuda-levers` alone, with all and with none, an engine for each.

What no lever does is the measure: a figure above 1 is a lever that helps. For another model, or for another
part, run that with CHORUS_CUDA_LEVERS set, once for each choice.
"""

from __future__ import annotations

import statistics
from functools import partial

from load_tests.gpu.context import Context
from load_tests.gpu.engine import adapters, mixes_of, time_steps
from load_tests.gpu.figures import Figure
from load_tests.gpu.subject import Mix, Subject, subject
from load_tests.gpu.workload import Workload

NONE = "none"
CHOICES = (NONE, "all", "rotate-write", "shrink-beside", "dependent-launch")
Steps = dict[str, float]  # median seconds of a decode step, by mix


def steps_of(on: Subject, mixes: dict[str, Mix], work: Workload) -> Steps:
    """The mixes' median decode steps over all rounds; the adapters must be in the arena."""

    def once(mix: Mix) -> float:
        return time_steps(on, mix, work.prompt, work.output)[1]

    for mix in mixes.values():
        once(mix)
    return {name: statistics.median(map(once, [mix] * work.rounds)) for name, mix in mixes.items()}


def measure(context: Context) -> None:
    """On engines of its own, of the small model: a start of the large one takes most of a minute."""
    work, results, deadline = context.workload, context.results, context.deadline
    mixes = mixes_of(work.sequences, work.rank, work.sequences)
    start = partial(
        subject,
        work.small_shape,
        ranks=[work.rank],
        arena_ranks=work.rank * work.sequences,
        max_num_seqs=work.sequences,
        kv_tokens=work.prompt + work.output,
    )
    without: Steps = {}
    for choice in CHOICES:
        if deadline.over:
            results.say(f"out of time before {choice}")
            return
        with start(cuda_levers=choice) as on:
            context.head(on)
            on.load(adapters(work.sequences, [work.rank]))
            steps = steps_of(on, mixes, work)
        without = without or steps
        for mix, step in steps.items():
            results.say(f"{choice:18} {mix:10} {1e3 * step:8.3f} ms/step")
        if choice != NONE:
            results.add(
                figures=[
                    Figure(f"{choice}, {mix}: speed / none", (without[mix] / steps[mix],)) for mix in steps
                ]
            )
