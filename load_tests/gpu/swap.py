"""Adapters on their way into the arena: how fast one is copied, and what that costs those who decode.

- Copy: an adapter whose image is in page-locked host memory goes into the arena the engine's own way (a
  LoadAdapter call, and the milliseconds that its answer states), in turns with a plain copy of as many bytes
  from page-locked memory, both by the host's clock and with the engine idle. The storm states the same of
  the copies that it made while steps went on.
- Storm: sequences decode, each with one of the adapters that stay, while eight loads are always under way:
  from the host's images, each evicting the one used least recently, or from disk (which is the page cache,
  see `subject`), each forgotten again as soon as it is in the arena. Rounds of calm and of both storms take
  turns; every one starts anew, so all see the same context. Inter-token is the time between one step's end
  and the next one's: every sequence gets a token in each.

On a CPU "page-locked" is ordinary memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np
import torch

from load_tests.gpu.context import Context
from load_tests.gpu.figures import Deadline, Figure, Results, alternate, ratios
from load_tests.gpu.subject import Subject, Version
from load_tests.gpu.timing import device
from server.messages import AdapterResult, UnloadAdapter

# Loads of a storm: their copies outlast the two steps that it takes to hear of one and call again.
UNDER_WAY = 8
_IN_USE = 8  # adapters of those who decode
IN_ARENA = _IN_USE + 2 * UNDER_WAY  # adapters it must hold at least, so that one can always come
_PROMPT = 64  # tokens
_WARM_STEPS = 8  # before each window's first


@dataclass(frozen=True)
class Copy:
    """One round of the same bytes both ways."""

    nbytes: int
    plain_s: float
    engine_s: float


@dataclass(frozen=True)
class Window:
    """One round of decoding."""

    weather: str
    round: int
    gaps_s: tuple[float, ...]  # between the ends of steps
    loads: int  # that came into the arena
    evictions: int  # that made room for them; forgotten ones not counted
    load_s: tuple[float, ...]  # work of each load

    @property
    def p99_s(self) -> float:
        return float(np.percentile(self.gaps_s, 99))


class Storm:
    """Keeps `UNDER_WAY` loads of these versions under way; none when there are no versions."""

    def __init__(self, subject: Subject, versions: Iterable[Version], *, forget: bool) -> None:
        self._subject = subject
        self._versions = cycle(versions)
        self._forget = forget
        self._under_way: dict[int, str] = {}  # digests, by number of the call
        self.load_s: list[float] = []

    def feed(self) -> None:
        """Call for the next ones, before a step."""
        while len(self._under_way) < UNDER_WAY and (version := next(self._versions, None)) is not None:
            call = self._subject.call(version)
            self._under_way[call.call_id] = call.adapter.digest
            self._subject.engine.load_adapter(call)

    def take(self, results: Iterable[AdapterResult]) -> None:
        """What a step answered: to loads, or to the calls to forget them."""
        for result in results:
            if digest := self._under_way.pop(result.call_id, None):
                self.load_s.append(result.milliseconds / 1000)
                if self._forget:
                    self._subject.engine.unload_adapter(UnloadAdapter(-1, digest, forget=True))

    def end(self) -> None:
        """Steps until nothing is under way."""
        while self._under_way:
            self.take(self._subject.turn()[1])


def copy_once(subject: Subject, version: Version, pair: tuple[torch.Tensor, torch.Tensor]) -> Copy:
    """`version` must be on the host. `pair`: where a plain copy goes, and as many bytes to copy."""
    target, source = pair
    start = time.perf_counter()
    target.copy_(source, non_blocking=True)
    if target.is_cuda:
        torch.cuda.synchronize()
    plain = time.perf_counter() - start
    subject.engine.unload_adapter(UnloadAdapter(-1, subject.ref(version).digest))
    return Copy(source.nbytes, plain, subject.bring(version))


def copies(subject: Subject, version: Version, rounds: int) -> list[Copy]:
    """Of one version, after two rounds that do not count."""
    subject.load([version])
    nbytes = subject.adapter_bytes(version.rank)
    source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=device() == "cuda")
    pair = torch.zeros_like(source, device=device()), source
    return [copy_once(subject, version, pair) for _ in range(rounds + 2)][2:]


def output_tokens(steps: int) -> int:
    """More than a window of so many steps makes: every sequence lives until its end."""
    return steps + 4 * _WARM_STEPS


def longest(steps: int) -> int:
    """Tokens of a sequence, prompt and output together."""
    return _PROMPT + output_tokens(steps)


def window(
    subject: Subject, weather: str, storm: Storm, users: Sequence[Version], steps: int, number: int = 0
) -> Window:
    """`steps` decode steps of one sequence for each of `users`, with the storm beside them.

    Raises RuntimeError when a step gives not every sequence its token.
    """
    engine = subject.engine
    ids = [subject.add(version, _PROMPT, output_tokens(steps)) for version in users]
    subject.begin(ids)
    for _ in range(_WARM_STEPS):
        storm.feed()
        storm.take(subject.turn()[1])
    before, done = engine.stats(), len(storm.load_s)
    gaps, last = [], time.perf_counter()
    for _ in range(steps):
        storm.feed()
        outputs, results = subject.turn()
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
        storm.take(results)
        if len(outputs) != len(ids):
            raise RuntimeError(f"{len(outputs)} of {len(ids)} sequences got a token")
    after, load_s = engine.stats(), tuple(storm.load_s[done:])
    engine.abort(ids)
    storm.end()
    seen = Window(
        weather,
        number,
        tuple(gaps),
        after.adapter_loads - before.adapter_loads,
        after.adapter_evictions - before.adapter_evictions,
        load_s,
    )
    print(f"{weather:5} {steps:4d} steps, p99 {1000 * seen.p99_s:.2f} ms, {seen.loads} loads", flush=True)
    return seen


def windows(
    subject: Subject,
    rank: int,
    sequences: int,
    *,
    steps: int,
    rounds: int,
    deadline: Deadline,
    results: Results,
) -> list[Window]:
    """Rounds of calm and of both storms; adapters that stay, and the host's images, are brought in first."""
    room = subject.engine.info.arena_bytes // subject.adapter_bytes(rank) - _IN_USE
    storming = room + UNDER_WAY  # more than the arena holds beside those in use
    staying = [Version(rank, number) for number in range(_IN_USE)]
    from_host = [Version(rank, _IN_USE + number) for number in range(storming)]
    from_disk = [Version(rank, _IN_USE + storming + number) for number in range(storming)]
    subject.load(from_host + staying)
    users = [staying[index % len(staying)] for index in range(sequences)]
    weathers = {
        "calm": Storm(subject, [], forget=False),
        "host": Storm(subject, from_host, forget=False),
        "disk": Storm(subject, from_disk, forget=True),
    }
    for name, storm in weathers.items():
        window(subject, name, storm, users, _WARM_STEPS)
    works = {name: partial(window, subject, name, storm, users, steps) for name, storm in weathers.items()}
    return [one for many in alternate(works, rounds, deadline, results).values() for one in many]


def copy_figures(copied: Sequence[Copy]) -> list[Figure]:
    plain = tuple(copy.nbytes / copy.plain_s / 1e9 for copy in copied)
    engine = tuple(copy.nbytes / copy.engine_s / 1e9 for copy in copied)
    return [
        Figure("copy, plain: GB/s", plain),
        Figure("copy, engine: GB/s", engine),
        Figure("copy, engine: rate / plain", ratios(engine, plain), at_least=0.8),
    ]


def storm_figures(seen: Sequence[Window], copied: Sequence[Copy]) -> list[Figure]:
    """What storms do to those who decode, and to the copies themselves."""
    nbytes, plain_s = copied[0].nbytes, statistics.median(copy.plain_s for copy in copied)
    calm = [window.p99_s for window in seen if window.weather == "calm"]
    figures = [Figure("calm: inter-token p99, ms", tuple(1000 * p99 for p99 in calm))]
    for weather in ("host", "disk"):
        found = [window for window in seen if window.weather == weather]
        p99 = [window.p99_s for window in found]
        rates = tuple(window.loads * nbytes / sum(window.gaps_s) / 1e9 for window in found)
        figures += [
            Figure(f"storm from {weather}: p99, ms", tuple(1000 * value for value in p99)),
            Figure(f"storm from {weather}: p99 / calm", ratios(p99, calm), at_most=1.3),
            Figure(f"storm from {weather}: loaded, GB/s", rates),
        ]
    beside = [statistics.median(w.load_s) for w in seen if w.weather == "host" and w.load_s]
    if beside:
        shares = tuple(plain_s / seconds for seconds in beside)
        figures.append(Figure("copy beside steps: rate / plain", shares, at_least=0.8))
    return figures


def host_images(in_arena: int) -> int:
    """Adapters for which the host needs room, beside an arena for so many: all but those from disk, which
    are forgotten at once."""
    return in_arena + 3 * UNDER_WAY


def measure(context: Context) -> None:
    """On the shared engine."""
    on, work, results = context.subject(), context.workload, context.results
    results.add(rank=work.rank, sequences=work.sequences)
    results.say(f"rank {work.rank}: {on.adapter_bytes(work.rank) / 1e6:.1f} MB")
    copied = copies(on, Version(work.rank), work.copies)
    results.add(copied, copy_figures(copied))
    seen = windows(
        on,
        work.rank,
        work.sequences,
        steps=work.storm_steps,
        rounds=work.storms,
        deadline=context.deadline,
        results=results,
    )
    results.add(figures=storm_figures(seen, copied))
