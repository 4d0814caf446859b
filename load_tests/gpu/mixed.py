"""A prompt that joins those who decode: the step that holds both, against the decode step beside it.

64 sequences decode, on the base model or each with an adapter of its own; before every second step a request
of one prompt and one output token comes in, so that mixed steps and decode steps take turns in one batch.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial

from load_tests.gpu.context import Context
from load_tests.gpu.engine import adapters
from load_tests.gpu.figures import Figure, alternate
from load_tests.gpu.subject import Mix, Subject

PAIRS = 10  # of a decode step and a mixed one, in a round
_WARM_PAIRS = 2


@dataclass(frozen=True)
class Row:
    """One round of one mix."""

    mix: str
    round: int
    decode_s: float  # median step of the sequences alone
    mixed_s: float  # median step with the prompt beside them


def timed_turn(subject: Subject, expected: int) -> float:
    """Seconds of one step. Raises RuntimeError when it gives not so many sequences a token."""
    start = time.perf_counter()
    outputs = subject.turn()[0]
    seconds = time.perf_counter() - start
    if len(outputs) != expected:
        raise RuntimeError(f"{len(outputs)} of {expected} sequences got a token")
    return seconds


def time_pair(subject: Subject, mix: Mix, prompt: int) -> tuple[float, float]:
    """Seconds of a decode step of the running batch, and of one that a prompt joins."""
    decode = timed_turn(subject, len(mix))
    subject.add(mix[0], prompt, output=1)
    return decode, timed_turn(subject, len(mix) + 1)


def once(subject: Subject, name: str, mix: Mix, prompt: int, number: int) -> Row:
    """A round of one mix: prompts first, then pairs of steps."""
    ids = [subject.add(version, prompt, output_tokens()) for version in mix]
    subject.begin(ids)
    pairs = [time_pair(subject, mix, prompt) for _ in range(_WARM_PAIRS + PAIRS)][_WARM_PAIRS:]
    subject.engine.abort(ids)
    decode, mixed = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Row(name, number, decode, mixed)


def output_tokens() -> int:
    """More than a round makes: every sequence lives until its end."""
    return 2 * (_WARM_PAIRS + PAIRS) + 8


def figures_of(name: str, rows: list[Row]) -> list[Figure]:
    ratio = tuple(row.mixed_s / row.decode_s for row in rows)
    return [
        Figure(f"mixed step, {name}: ms", tuple(1e3 * row.mixed_s for row in rows)),
        Figure(f"mixed step, {name}: time / decode step", ratio, at_most=1.3),
    ]


def measure(context: Context) -> None:
    """On the shared engine."""
    on, work, results = context.subject(), context.workload, context.results
    results.add(sequences=work.sequences, prompt=work.prompt)
    mixes: dict[str, Mix] = {
        "base": [None] * work.sequences,
        "distinct": adapters(work.sequences, [work.rank]),
    }
    on.load(version for version in mixes["distinct"] if version is not None)
    works = {name: partial(once, on, name, mix, work.prompt) for name, mix in mixes.items()}
    for name, rows in alternate(works, work.rounds, context.deadline, results).items():
        results.add(figures=figures_of(name, rows))
