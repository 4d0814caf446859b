"""Steps of the whole engine on random weights in a real shape: decode and prefill, base against adapters.

Whatever is compared takes turns, round by round, in one process, and times are the host's clock around
`Engine.step`, so that what the host adds counts.

- Decode: no adapter (base), one for all sequences, and as many as there are sequences (up to 64), by batch.
  A step must read the weights, each distinct adapter in use and the live KV entries once; the share of the
  floor is that many bytes at the measured copy rate, over the time taken. At batch 256 arithmetic takes as
  long as reading, so it has no target.
- Prefill: prompts of 512 tokens for all sequences in one step, where arithmetic sets the time.

In the order of what they are worth, until the time is over. On a CPU there is no floor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from load_tests.gpu.context import Context
from load_tests.gpu.figures import Deadline, Figure, Results, alternate, ratios
from load_tests.gpu.subject import Mix, Subject, Version, subject
from load_tests.gpu.workload import Workload

_WARM_TOKENS = 4  # of output, before each mix is measured
_ROOMY_BATCH = 64  # up to here, reading takes longer than arithmetic on the GPUs that we know


@dataclass(frozen=True)
class Row:
    """One round of one mix."""

    part: str
    mix: str
    batch: int
    round: int
    prefill_s: float  # of all prompts
    step_s: float  # median decode step; 0 where there was none
    step_bytes: int  # that it must read


@dataclass(frozen=True)
class Stage:
    """Mixes that are compared with each other."""

    part: str
    mixes: dict[str, Mix]
    prompt: int  # tokens
    output: int  # tokens


def time_steps(
    subject: Subject, mix: Mix, prompt: int, output: int, **sampling: float
) -> tuple[float, float]:
    """Seconds of the whole prefill, and the median decode step (0 for outputs of one token)."""
    ids = [subject.add(version, prompt, output, **sampling) for version in mix]
    start = time.perf_counter()
    subject.begin(ids)
    prefill = time.perf_counter() - start
    steps = []
    while subject.engine.idle_ms() is not None:
        start = time.perf_counter()
        subject.turn()
        steps.append(time.perf_counter() - start)
    return prefill, statistics.median(steps) if steps else 0.0


def rows_of(
    subject: Subject, stage: Stage, *, rounds: int, deadline: Deadline, results: Results
) -> list[Row]:
    """Every round of every mix. Their adapters must be in the arena."""
    prompt, output = stage.prompt, stage.output
    for mix in stage.mixes.values():
        time_steps(subject, mix, prompt, min(output, _WARM_TOKENS))

    def once(name: str, number: int) -> Row:
        mix = stage.mixes[name]
        prefill, step = time_steps(subject, mix, prompt, output)
        must_read = subject.step_bytes(mix, prompt + output / 2).total
        return Row(stage.part, name, len(mix), number, prefill, step, must_read)

    by_mix = alternate({name: partial(once, name) for name in stage.mixes}, rounds, deadline, results)
    for name, rows in by_mix.items():
        prefill, step = (
            statistics.median(getattr(row, of) for row in rows) for of in ("prefill_s", "step_s")
        )
        results.say(
            f"{stage.part:8} {name:12} batch {len(stage.mixes[name]):4d}  "
            f"prefill {rows[0].batch * prompt / prefill:9.0f} tok/s  decode {1e3 * step:8.3f} ms/step"
        )
    return [row for rows in by_mix.values() for row in rows]


def adapters(number: int, ranks: Sequence[int]) -> list[Version]:
    """`number` distinct versions; `ranks` are dealt out in turn."""
    return [Version(ranks[index % len(ranks)], index) for index in range(number)]


def mixes_of(batch: int, rank: int, most: int) -> dict[str, Mix]:
    """Base-only, one adapter for all, and one for each where that is no more than `most`."""
    mixes: dict[str, Mix] = {"base": [None] * batch, "one": adapters(1, [rank]) * batch}
    return mixes | ({"distinct": adapters(batch, [rank])} if 1 < batch <= most else {})


def stages(workload: Workload) -> list[Stage]:
    """In the order of what they are worth."""

    def stage(part: str, batch: int, prompt: int, output: int) -> Stage:
        return Stage(part, mixes_of(batch, workload.rank, workload.sequences), prompt, output)

    sequences, tokens = workload.prefill
    return [
        *(stage("decode", batch, workload.prompt, workload.output) for batch in workload.batches),
        stage("prefill", sequences, tokens, output=1),
        stage("decode", workload.large_batch, workload.prompt, workload.output),
    ]


def decode_figures(rows: Sequence[Row], rate: float | None) -> list[Figure]:
    """Of one batch size. `rate`: bytes/s; without one there is no floor."""
    figures, batch, by_mix = [], rows[0].batch, _by_mix(rows)
    for mix, of_mix in by_mix.items():
        if mix != "one" and rate is not None:
            target = 0.75 if batch <= _ROOMY_BATCH and (mix == "base" or batch == _ROOMY_BATCH) else None
            figures.append(
                Figure(f"decode {batch}, {mix}: share of floor", shares_of_floor(of_mix, rate), target)
            )
        if mix != "base":
            speed = ratios([row.step_s for row in by_mix["base"]], [row.step_s for row in of_mix])
            target = 0.92 if mix == "one" else None
            figures.append(Figure(f"decode {batch}, {mix}: speed / base", speed, target))
    return figures


def shares_of_floor(rows: Sequence[Row], rate: float) -> tuple[float, ...]:
    return tuple(row.step_bytes / rate / row.step_s for row in rows)


def prefill_figures(rows: Sequence[Row]) -> list[Figure]:
    times = {mix: [row.prefill_s for row in of_mix] for mix, of_mix in _by_mix(rows).items()}
    return [
        Figure(f"prefill, {mix}: speed / base", ratios(times["base"], of_mix), at_least=0.9)
        for mix, of_mix in times.items()
        if mix != "base"
    ]


def _by_mix(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """In order of the rounds."""
    return {mix: [row for row in rows if row.mix == mix] for mix in dict.fromkeys(row.mix for row in rows)}


def run(on: Subject, context: Context, workload: Workload) -> None:
    """Every stage, as far as the time reaches."""
    results, deadline = context.results, context.deadline
    results.add(rank=workload.rank)
    if not on.load(adapters(workload.sequences, [workload.rank]), deadline):
        results.say("out of time before the adapters were in the arena")
        return
    for stage in stages(workload):
        if deadline.over:
            results.say(f"out of time before {stage.part} {len(stage.mixes['base'])}")
            return
        rows = rows_of(on, stage, rounds=workload.rounds, deadline=deadline, results=results)
        results.add(
            figures=prefill_figures(rows) if stage.part == "prefill" else decode_figures(rows, context.rate)
        )


def measure(context: Context) -> None:
    """On the shared engine."""
    run(context.subject(), context, context.workload)


def measure_small(context: Context) -> None:
    """On an engine of its own with the small model."""
    workload = replace(context.workload, shape=context.workload.small_shape)
    with subject(
        workload.shape,
        ranks=[workload.rank],
        arena_ranks=workload.rank * workload.sequences,
        max_num_seqs=workload.most_sequences,
        kv_tokens=workload.longest,
    ) as on:
        context.head(on)
        run(on, context, workload)
