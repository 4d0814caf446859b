"""Adapters of mixed ranks beside as many of one rank with the same sum, and of the largest.

The targets are ours: no slower than the same sum by more than a tenth, and, of what all at the largest add
to a base-only step, no more than 0.6 (the sums of ranks say 0.5; a cost that follows the largest says 1).
Sixteen adapters, because packing 64 of each rank takes one thread longer than all the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from load_tests.gpu.context import Context
from load_tests.gpu.engine import Row, Stage, adapters, rows_of, shares_of_floor
from load_tests.gpu.figures import Figure, ratios
from load_tests.gpu.subject import Mix, Version, subject

MIXED = (8, 64, 32, 8, 16, 64, 32, 32)  # dealt out in turn; their mean is a rank that adapters have
SAME_SUM = sum(MIXED) // len(MIXED)


def mixes_of(batch: int) -> dict[str, Mix]:
    """Adapters of mixed ranks, of one rank with the same sum, and of the largest rank."""
    return {
        "base": [None] * batch,
        "mixed": adapters(batch, MIXED),
        "same sum": adapters(batch, [SAME_SUM]),
        "largest": adapters(batch, [max(MIXED)]),
    }


def versions_of(batch: int) -> set[Version]:
    """All adapters of all mixes."""
    return {version for mix in mixes_of(batch).values() for version in mix if version is not None}


def figures_of(rows: Sequence[Row], rate: float | None) -> list[Figure]:
    """What mixed ranks cost, beside the same sum and beside all at the largest."""
    base, mixed, same, largest = (
        [row.step_s for row in rows if row.mix == mix] for mix in ("base", "mixed", "same sum", "largest")
    )
    figures = [Figure(f"ranks mixed: speed / all {SAME_SUM}", ratios(same, mixed), at_least=0.9)]
    added = [[step - plain for step, plain in zip(steps, base, strict=True)] for steps in (mixed, largest)]
    if min(added[1]) > 0:  # of a small model noise may be more
        figures.append(Figure(f"ranks mixed: adds / all {max(MIXED)}", ratios(*added), at_most=0.6))
    if rate is not None:
        shares = shares_of_floor([row for row in rows if row.mix == "mixed"], rate)
        figures.append(Figure("ranks mixed: share of floor", shares))
    return figures


def measure(context: Context) -> None:
    """On an engine of its own, whose arena holds every rank."""
    work, results, deadline = context.workload, context.results, context.deadline
    batch = work.mixed_rank_adapters
    versions = versions_of(batch)
    with subject(
        work.shape,
        ranks={version.rank for version in versions},
        arena_ranks=sum(version.rank for version in versions),
        max_num_seqs=batch,
        kv_tokens=work.prompt + work.output,
    ) as on:
        context.head(on)
        if not on.load(sorted(versions, key=lambda version: (version.rank, version.number)), deadline):
            results.say("out of time before the adapters were in the arena")
            return
        stage = Stage("ranks", mixes_of(batch), work.prompt, work.output)
        rows = rows_of(on, stage, rounds=work.rounds, deadline=deadline, results=results)
        results.add(figures=figures_of(rows, context.rate))
