"""Steps of the whole engine on random weights in a real shape: decode and prefill, base against adapters.

    python -m load_tests.gpu.engine --shape llama-3.1-8b

Three measurements; whatever is compared takes turns, round by round, in one process, and times are the host's
clock around `Engine.step`, so that what the host adds counts.

- Decode: no adapter (base), one for all sequences, and as many as there are sequences (up to 64), by batch.
  A step must read the weights, each distinct adapter in use and the live KV entries once; the share of the
  floor is that many bytes at the measured copy rate, over the time taken. At batch 256 arithmetic takes as
  long as reading, so it has no target.
- Prefill: prompts of 512 tokens for all sequences in one step, where arithmetic sets the time.
- Ranks: 64 adapters of ranks 8 to 64 beside as many of one rank with the same sum, and of the largest. The
  targets are ours: no slower than the same sum by more than a tenth, and, of what all at the largest add to
  a base-only step, no more than 0.6 (the sums of ranks say 0.5; a cost that follows the largest says 1).

Measured in this order until the time is over. Runs on a CPU too (`--shape tiny`), without the floor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from load_tests.gpu.figures import Deadline, Figure, alternate, finish, ratios
from load_tests.gpu.subject import Mix, Subject, Version, adapter_bytes, parser, subject
from load_tests.gpu.timing import copy_rate

RANK = 16
ADAPTERS = 64  # distinct ones, at most
MIXED = (8, 64, 32, 8, 16, 64, 32, 32)  # dealt out in turn; their mean is a rank that adapters have
SAME_SUM = sum(MIXED) // len(MIXED)
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


def measure(subject: Subject, mix: Mix, prompt: int, output: int) -> tuple[float, float]:
    """Seconds of the whole prefill, and the median decode step (0 for outputs of one token)."""
    ids = [subject.add(version, prompt, output) for version in mix]
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
    subject: Subject,
    part: str,
    mixes: dict[str, Mix],
    *,
    prompt: int,
    output: int,
    rounds: int,
    deadline: Deadline,
) -> list[Row]:
    """Every round of every mix. Their adapters must be in the arena."""
    for mix in mixes.values():
        measure(subject, mix, prompt, min(output, _WARM_TOKENS))
    works = {name: partial(measure, subject, mix, prompt, output) for name, mix in mixes.items()}
    results = alternate(works, rounds, deadline)
    rows = [
        Row(part, name, len(mix), number, prefill, step, subject.step_bytes(mix, prompt + output / 2).total)
        for name, mix in mixes.items()
        for number, (prefill, step) in enumerate(results[name])
    ]
    for name, mix in mixes.items():
        prefill, step = (statistics.median(times) for times in zip(*results[name], strict=True))
        print(
            f"{part:8} {name:12} batch {len(mix):4d}  prefill {len(mix) * prompt / prefill:9.0f} tok/s"
            f"  decode {1e3 * step:8.3f} ms/step",
            flush=True,
        )
    return rows


def adapters(number: int, ranks: Sequence[int] = (RANK,)) -> list[Version]:
    """`number` distinct versions; `ranks` are dealt out in turn."""
    return [Version(ranks[index % len(ranks)], index) for index in range(number)]


def mixes_of(batch: int) -> dict[str, Mix]:
    """Base-only, one adapter for all, and one for each where there are so many."""
    mixes: dict[str, Mix] = {"base": [None] * batch, "one": adapters(1) * batch}
    return mixes | ({"distinct": adapters(batch)} if 1 < batch <= ADAPTERS else {})


def rank_mixes(batch: int) -> dict[str, Mix]:
    """Adapters of mixed ranks, of one rank with the same sum, and of the largest rank."""
    return {
        "base": [None] * batch,
        "mixed": adapters(batch, MIXED),
        "same sum": adapters(batch, (SAME_SUM,)),
        "largest": adapters(batch, (max(MIXED),)),
    }


def decode_figures(rows: Sequence[Row], rate: float | None) -> list[Figure]:
    """By batch, smallest first. `rate`: bytes/s; without one there is no floor."""
    figures = []
    for batch in sorted({row.batch for row in rows}):
        steps = _by_mix([row for row in rows if row.batch == batch])
        for mix, of_mix in steps.items():
            if mix != "one" and rate is not None:
                target = 0.75 if batch == ADAPTERS or (mix == "base" and batch <= _ROOMY_BATCH) else None
                shares = tuple(row.step_bytes / rate / row.step_s for row in of_mix)
                figures.append(Figure(f"decode {batch}, {mix}: share of floor", shares, target))
            if mix != "base":
                speed = ratios([row.step_s for row in steps["base"]], [row.step_s for row in of_mix])
                target = 0.92 if mix == "one" else None
                figures.append(Figure(f"decode {batch}, {mix}: speed / base", speed, target))
    return figures


def prefill_figures(rows: Sequence[Row]) -> list[Figure]:
    times = {mix: [row.prefill_s for row in of_mix] for mix, of_mix in _by_mix(rows).items()}
    return [
        Figure(f"prefill, {mix}: speed / base", ratios(times["base"], of_mix), at_least=0.88)
        for mix, of_mix in times.items()
        if mix != "base"
    ]


def rank_figures(rows: Sequence[Row], rate: float | None) -> list[Figure]:
    """What mixed ranks cost, beside the same sum and beside all at the largest."""
    by_mix = _by_mix(rows)
    base, mixed, same, largest = (
        [row.step_s for row in by_mix[mix]] for mix in ("base", "mixed", "same sum", "largest")
    )
    figures = [Figure(f"ranks mixed: speed / all {SAME_SUM}", ratios(same, mixed), at_least=0.9)]
    added = [[step - plain for step, plain in zip(steps, base, strict=True)] for steps in (mixed, largest)]
    if min(added[1]) > 0:  # of a small model noise may be more
        figures.append(Figure(f"ranks mixed: adds / all {max(MIXED)}", ratios(*added), at_most=0.6))
    if rate is not None:
        shares = tuple(row.step_bytes / rate / row.step_s for row in by_mix["mixed"])
        figures.append(Figure("ranks mixed: share of floor", shares))
    return figures


def _by_mix(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """In order of the rounds."""
    return {mix: [row for row in rows if row.mix == mix] for mix in dict.fromkeys(row.mix for row in rows)}


def run(
    subject: Subject,
    *,
    batches: Sequence[int],
    prompt: int,
    output: int,
    prefill: tuple[int, int],
    rounds: int,
    deadline: Deadline,
    rate: float | None,
) -> tuple[list[Row], list[Figure]]:
    """Everything, as far as the time reaches. `prefill`: sequences, and tokens of each prompt."""
    rows: list[Row] = []
    timed = partial(rows_of, subject, rounds=rounds, deadline=deadline)
    in_time = subject.load(adapters(min(ADAPTERS, max(*batches, prefill[0]))), deadline)
    for batch in batches if in_time else ():
        if not deadline.over:
            rows += timed("decode", mixes_of(batch), prompt=prompt, output=output)
    figures = decode_figures(rows, rate)
    if in_time and not deadline.over:
        sequences, tokens = prefill
        added = timed("prefill", mixes_of(sequences), prompt=tokens, output=1)
        rows, figures = rows + added, figures + prefill_figures(added)
    batch = min(ADAPTERS, max(batches))
    mixes = rank_mixes(batch)
    wanted = [version for mix in mixes.values() for version in mix if version is not None]
    if not deadline.over and subject.load(wanted, deadline):
        added = timed("ranks", mixes, prompt=prompt, output=output)
        rows, figures = rows + added, figures + rank_figures(added, rate)
    return rows, figures


def arena_ranks() -> int:
    """What the ranks of all adapters that are measured add up to."""
    versions = {version for mix in rank_mixes(ADAPTERS).values() for version in mix if version is not None}
    return sum(version.rank for version in versions | set(adapters(ADAPTERS)))


def main() -> None:
    options = parser(__doc__, shape="llama-3.1-8b", rounds=3, seconds=85)
    options.add_argument("--batches", default="64,16,1,256", help="sequences at once, in this order")
    options.add_argument("--prompt", type=int, default=128, help="tokens, of decode")
    options.add_argument("--output", type=int, default=32, help="tokens, of decode")
    options.add_argument("--prefill", default="16x512", help="sequences x tokens of a prompt, of prefill")
    args = options.parse_args()
    deadline = Deadline(args.seconds)
    batches = [int(batch) for batch in args.batches.split(",")]
    sequences, tokens = map(int, args.prefill.split("x"))
    rate = copy_rate() if torch.cuda.is_available() else None  # bytes/s, read and written counted alike
    with subject(
        args.shape,
        ranks={RANK, SAME_SUM, *MIXED},
        arena_ranks=arena_ranks(),
        max_num_seqs=max(*batches, sequences),
        kv_tokens=args.prompt + args.output + sequences * tokens // max(*batches, sequences),
    ) as on:
        info = on.engine.info
        size = (
            f"{info.weights_bytes / 1e9:.1f} GB, rank {RANK}: {adapter_bytes(args.shape, RANK) / 1e6:.0f} MB"
        )
        print(f"{args.shape} on {info.device}, {size}; ready with {deadline.left:.0f} s left", flush=True)
        rows, figures = run(
            on,
            batches=batches,
            prompt=args.prompt,
            output=args.output,
            prefill=(sequences, tokens),
            rounds=args.rounds,
            deadline=deadline,
            rate=rate,
        )
    finish(figures, rows, args.json, shape=args.shape, rank=RANK, copy_rate=rate)


if __name__ == "__main__":
    main()
