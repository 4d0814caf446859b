"""Throughput and time to the first token against the number of adapters that requests ask for.

A closed loop, in this process, through `Engine.add` and `Engine.step`: as many requests as the engine runs at
once, another one for each that ended. It needs no rate that suits the machine, keeps the engine full, and
nothing queues for a place, so that the time to the first token is the wait for an adapter and the prompt's
own time. The k-th adapter is asked for in proportion to k**-alpha, and outputs differ in length so that
requests do not run in step (`load_tests.trace`). Registering costs the engine nothing: it sees an adapter
when a request names it (`load_tests scaling registered` goes through the registry and HTTP).

The arena holds 100 adapters; the others wait as images in host memory, as many as its cache takes, and on
disk (the page cache, see `subject`). 2,000 images of rank 16 for Llama-3.1-8B would be 168 GB. So it takes
the small model and rank 8, 8.8 MB each, and a cache of 8 GiB for 976 of them. A fifth of the time goes to
bringing in the most popular first, and every point runs for a while before its first measured request;
beyond the cache, misses come from disk.

Points take turns, there and back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle

import numpy as np

from load_tests.gpu.context import Context
from load_tests.gpu.figures import Deadline, Figure, Results, alternate, ratios
from load_tests.gpu.subject import Subject, Version, subject
from load_tests.trace import Lengths, TraceRequest, TraceSpec, adapter_names, generate
from server.messages import TokenOutput

IN_ARENA = 100  # adapters
_WARM_SHARE = 0.25  # of a window's time, before what is measured
_BRING_IN_SHARE = 0.2  # of all the time
_MEASURE_SHARE = 0.8  # of what is left then; windows end when the last one has its first token
_SHORTEST_S = 0.4  # of a window
_DRAWN = 4096  # requests, which then come again
_RANK = 8
_ALPHA = 1.0  # of the popularity; 0: all equally popular


@dataclass(frozen=True)
class Load:
    """What is asked for at every point."""

    rank: int
    concurrency: int
    alpha: float
    prompt: int  # tokens
    output: tuple[int, int]  # tokens, fewest and most


@dataclass(frozen=True)
class Window:
    """One round at one point."""

    registered: int
    seconds: float
    tokens: int  # of output, within those seconds
    ttft_s: tuple[float, ...]  # of the requests added within them
    loads: int  # copies into the arena within them

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def ttft_ms(self, percentile: float) -> float:
        return 1000 * float(np.percentile(self.ttft_s, percentile))


def draw(registered: int, load: Load, seed: int) -> list[TraceRequest]:
    """Requests whose `rank` says which adapter they ask for, 1 the most popular."""
    low, high = load.output
    return generate(
        TraceSpec(
            _DRAWN,
            adapter_names(registered),
            alpha=load.alpha,
            prompt_tokens=Lengths("fixed", 1, 1),  # its own tokens do not matter, see Subject.add
            output_tokens=Lengths("uniform", low, high),
            seed=seed,
        )
    )


class ClosedLoop:
    """Keeps `load.concurrency` requests in the engine."""

    def __init__(self, subject: Subject, load: Load, requests: Sequence[TraceRequest]) -> None:
        self._subject, self._load = subject, load
        self._requests: Iterator[TraceRequest] = cycle(requests)
        self._live: set[str] = set()
        self._waiting: dict[str, float] = {}  # when they were added, of those without a first token
        self.ttft: list[tuple[float, float]] = []  # when added, seconds from there to the first token

    def run(self, seconds: float) -> int:
        """For so long; returns how many tokens came out."""
        end, tokens = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            while len(self._live) < self._load.concurrency:
                self._add(next(self._requests))
            tokens += self._turn()
        return tokens

    def end(self) -> None:
        """Until every request has its first token; what is left of them is not run."""
        while self._waiting:
            self._turn()
        self._subject.engine.abort(self._live)
        self._live.clear()

    def _add(self, request: TraceRequest) -> None:
        version = Version(self._load.rank, request.rank - 1)
        added = time.perf_counter()
        request_id = self._subject.add(version, self._load.prompt, request.max_tokens)
        self._live.add(request_id)
        self._waiting[request_id] = added

    def _turn(self) -> int:
        outputs = self._subject.turn()[0]
        now = time.perf_counter()
        for output in outputs:
            self._note(output, now)
        return sum(len(output.token_ids) for output in outputs)

    def _note(self, output: TokenOutput, now: float) -> None:
        added = self._waiting.pop(output.request_id, None)
        if added is not None:
            self.ttft.append((added, now - added))
        if output.finish_reason is not None:
            self._live.remove(output.request_id)


def window(subject: Subject, load: Load, registered: int, seconds: float, number: int) -> Window:
    """One round; its number is the seed. Raises RuntimeError when it was too short for a single request."""
    loop = ClosedLoop(subject, load, draw(registered, load, number))
    loop.run(seconds * _WARM_SHARE)
    before, began = subject.engine.stats(), time.perf_counter()
    tokens = loop.run(seconds * (1 - _WARM_SHARE))
    took, after = time.perf_counter() - began, subject.engine.stats()
    loop.end()
    ttft = tuple(waited for added, waited in loop.ttft if began <= added < began + took)
    if not ttft:
        raise RuntimeError(f"no request was added within {took:.1f} s")
    seen = Window(registered, took, tokens, ttft, after.adapter_loads - before.adapter_loads)
    print(
        f"{registered:4d} adapters, {took:.1f} s: {seen.tokens_per_s:.0f} tokens/s, {seen.loads} loads",
        flush=True,
    )
    return seen


def bring_in(subject: Subject, load: Load, registered: int, deadline: Deadline) -> None:
    """The most popular to the host as far as the time reaches, and the first of them into the arena."""
    subject.load((Version(load.rank, number) for number in range(registered)), deadline)
    subject.load(Version(load.rank, number) for number in reversed(range(min(registered, IN_ARENA))))


def windows(
    subject: Subject,
    load: Load,
    points: Sequence[int],
    *,
    longest_s: float,
    rounds: int,
    deadline: Deadline,
    results: Results,
) -> list[Window]:
    """Every round at every point, of equal length, `longest_s` seconds at most."""
    bring_in(subject, load, max(points), Deadline(deadline.left * _BRING_IN_SHARE))
    share = _MEASURE_SHARE * deadline.left / (len(points) * rounds)
    seconds = min(max(share, _SHORTEST_S), longest_s)
    works = {str(point): partial(window, subject, load, point, seconds) for point in points}
    return [one for many in alternate(works, rounds, deadline, results).values() for one in many]


def figures_of(seen: Sequence[Window]) -> list[Figure]:
    """For each point, the fewest adapters first, which the others' speed is held against."""
    figures, fewest = [], [window for window in seen if window.registered == min(w.registered for w in seen)]
    for point in sorted({window.registered for window in seen}):
        found = [window for window in seen if window.registered == point]
        speed = [window.tokens_per_s for window in found]
        figures.append(Figure(f"{point:4d} adapters: tokens/s", tuple(speed)))
        if point != fewest[0].registered:
            of_fewest = ratios(speed, [window.tokens_per_s for window in fewest])
            figures.append(Figure(f"{point:4d} adapters: speed / {fewest[0].registered}", of_fewest))
        for percentile in (50, 99):
            ttft = tuple(window.ttft_ms(percentile) for window in found)
            figures.append(Figure(f"{point:4d} adapters: TTFT p{percentile}, ms", ttft))
        loads = tuple(window.loads / window.seconds for window in found)
        figures.append(Figure(f"{point:4d} adapters: loads/s", loads))
    return figures


def measure(context: Context) -> None:
    """On an engine of its own with the small model."""
    work, results = context.workload, context.results
    load = Load(_RANK, work.sequences, _ALPHA, work.prompt, work.sweep_output)
    with subject(
        work.small_shape,
        ranks=[load.rank],
        arena_ranks=load.rank * IN_ARENA,
        max_num_seqs=load.concurrency,
        kv_tokens=load.prompt + load.output[1],
        host_bytes=work.sweep_host_bytes,
    ) as on:
        context.head(on)
        results.add(**asdict(load))
        seen = windows(
            on,
            load,
            work.sweep_points,
            longest_s=work.sweep_window_s,
            rounds=work.rounds,
            deadline=context.deadline,
            results=results,
        )
    results.add(figures=figures_of(seen))
