"""Replay a trace against a server, in open or closed loop, and check the answers.

Open loop: each request is sent when its arrival time comes, whatever became of earlier ones; its latency
counts from that time, so a slow client or server cannot hide queueing (no coordinated omission). Closed loop:
N workers, each sending its next request when its last one ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import aiohttp
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from load_tests.client import Clock, Record, Target, complete, open_session
from load_tests.trace import TraceRequest

T = TypeVar("T")


class Answer(msgspec.Struct, frozen=True):
    """What a server said to one request."""

    adapter: str | None
    token_ids: list[int] | None
    text: str


class WrongAnswer(msgspec.Struct, frozen=True):
    """An answer that is not the expected one."""

    id: int
    adapter: str | None
    first_difference: int  # index of the first token (or, without token ids, character) that differs


class CheckResult(msgspec.Struct, frozen=True):
    """Answers held against expected ones."""

    against: str  # where the expected answers came from
    compared: int
    wrong: list[WrongAnswer]
    unverified: list[int]  # ids of answered requests for which nothing was expected


class RunResult(msgspec.Struct, frozen=True):
    """A run, as written to a result file."""

    label: str
    url: str
    mode: str  # "open loop", or "closed loop, N workers"
    started_at: str  # ISO 8601, UTC
    planned: int  # requests in the trace
    interrupted: bool
    records: list[Record]
    check: CheckResult | None = None

    @property
    def flawless(self) -> bool:
        """Every request was answered, and no answer is wrong or (if there was a check) unverified."""
        answered = sum(record.error is None for record in self.records)
        doubted = self.check is not None and (self.check.wrong or self.check.unverified)
        return answered == self.planned and not doubted


@dataclass
class Tally:
    """Live figures of a run in progress."""

    total: int = 0
    done: int = 0
    errors: int = 0
    tokens: int = 0
    in_flight: int = 0

    def add_tokens(self, count: int) -> None:
        self.tokens += count


def answer_key(request: TraceRequest) -> str:
    """Names what is asked: equal for equal (adapter, prompt, max_tokens), whatever trace it is in."""
    asked = msgspec.json.encode([request.adapter, request.prompt, request.max_tokens])
    return hashlib.sha256(asked).hexdigest()[:24]


def answers_of(trace: Iterable[TraceRequest], records: Iterable[Record]) -> dict[str, Answer]:
    """What was answered, by `answer_key`; failed requests are left out."""
    by_id = {request.id: request for request in trace}
    return {
        answer_key(by_id[record.id]): Answer(record.adapter, record.token_ids, record.text)
        for record in records
        if record.error is None
    }


def write_answers(path: Path, answers: Mapping[str, Answer]) -> None:
    """Write expected answers for `read_answers`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(answers), indent=1))


def read_answers(path: Path) -> dict[str, Answer]:
    """Read expected answers. Raises ValueError when the file holds something else."""
    return _read(path, dict[str, Answer])


def write_result(path: Path, result: RunResult) -> None:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(result))


def read_result(path: Path) -> RunResult:
    """Read a result file. Raises ValueError when it is not one."""
    return _read(path, RunResult)


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path.name}: {error}") from None


def check_answers(
    trace: Iterable[TraceRequest], records: Iterable[Record], expected: Mapping[str, Answer], against: str
) -> CheckResult:
    """Compare each answered request with its expected answer, by token ids where both have them."""
    keys = {request.id: answer_key(request) for request in trace}
    compared, wrong, unverified = 0, [], []
    for record in records:
        if record.error is not None:
            continue
        answer = expected.get(keys[record.id])
        if answer is None:
            unverified.append(record.id)
            continue
        compared += 1
        difference = _first_difference(record, answer)
        if difference is not None:
            wrong.append(WrongAnswer(record.id, record.adapter, difference))
    return CheckResult(against, compared, wrong, unverified)


def _first_difference(record: Record, expected: Answer) -> int | None:
    got: list[int] | str = record.text
    want: list[int] | str = expected.text
    if record.token_ids is not None and expected.token_ids is not None:
        got, want = record.token_ids, expected.token_ids
    if got == want:
        return None
    pairs = enumerate(zip(got, want, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(got), len(want)))


async def replay(
    trace: Iterable[TraceRequest],
    target: Target,
    records: list[Record],
    *,
    concurrency: int | None = None,
    tally: Tally | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Send every request of `trace` and append its record to `records` when it ends.

    concurrency: workers of a closed loop; None: open loop, by arrival times. Once `stop` is set nothing more
    is sent and what is in flight runs to its end; cancelled, it drops what is in flight.
    """
    tally = tally or Tally()
    stop = stop or asyncio.Event()
    begun = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - begun

    async with open_session() as session, asyncio.TaskGroup() as group:
        if concurrency is None:
            async for request in _arriving(trace, clock, stop):
                group.create_task(
                    _ask(session, target, request, clock, records, tally, due_s=request.arrival_s)
                )
            return
        queue = iter(trace)

        async def work() -> None:
            for request in queue:  # shared by the workers
                if stop.is_set():
                    return
                await _ask(session, target, request, clock, records, tally)

        for _ in range(concurrency):
            group.create_task(work())


async def _arriving(
    trace: Iterable[TraceRequest], clock: Clock, stop: asyncio.Event
) -> AsyncIterator[TraceRequest]:
    """Each request at its time, until `stop`."""
    for request in trace:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, request.arrival_s - clock())):
                await stop.wait()
        if stop.is_set():
            return
        yield request


async def _ask(
    session: aiohttp.ClientSession,
    target: Target,
    request: TraceRequest,
    clock: Clock,
    records: list[Record],
    tally: Tally,
    due_s: float | None = None,
) -> None:
    tally.in_flight += 1
    try:
        record = await complete(session, target, request, clock, due_s=due_s, on_tokens=tally.add_tokens)
    finally:
        tally.in_flight -= 1
    records.append(record)
    tally.done += 1
    tally.errors += record.error is not None


async def run_load(
    trace: list[TraceRequest],
    target: Target,
    *,
    label: str,
    concurrency: int | None = None,
    check: bool = False,
    expected: Mapping[str, Answer] | None = None,
    console: Console | None = None,
) -> RunResult:
    """Replay `trace` with a live progress line, then check the answers.

    check: afterwards ask every distinct request again, one at a time, and compare: what a request gets in a
    mixed batch must be what it gets alone. expected: compare with these answers instead.
    ^C stops sending and waits for what is in flight; a second ^C drops that too. Results so far are kept.
    """
    console = console or Console(stderr=True)
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    records: list[Record] = []
    verdict = None
    with _interrupts(console) as stop:
        await _watched("load", trace, target, records, concurrency, stop, console)
        _print_failures(records, console)
        if expected is not None:
            verdict = check_answers(trace, records, expected, "recorded answers")
        elif check and not stop.is_set():
            alone: list[Record] = []
            distinct = list({answer_key(request): request for request in trace}.values())
            await _watched("check", distinct, target, alone, 1, stop, console)
            _print_failures(alone, console)
            verdict = check_answers(trace, records, answers_of(trace, alone), "the same server, asked alone")
    return RunResult(
        label=label,
        url=target.url,
        mode="open loop" if concurrency is None else f"closed loop, {concurrency} workers",
        started_at=started_at,
        planned=len(trace),
        interrupted=stop.is_set(),
        records=sorted(records, key=lambda record: record.id),
        check=verdict,
    )


def _print_failures(records: Iterable[Record], console: Console) -> None:
    """How many requests failed, by kind, with an example of each."""
    failures: dict[str, list[str]] = defaultdict(list)
    for record in records:
        if record.error is not None:
            failures[record.error.partition(":")[0]].append(record.error)
    for errors in failures.values():
        console.print(f"{len(errors)} failed, for example: {errors[0]}", markup=False)


@contextlib.contextmanager
def _interrupts(console: Console) -> Iterator[asyncio.Event]:
    """An event that the first ^C sets; the second one cancels what the calling task waits for."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None  # run_load is a coroutine

    def interrupt() -> None:
        if stop.is_set():
            task.cancel()
        else:
            stop.set()
            console.print("Stopping: no more is sent, waiting for what is in flight (^C again to drop it).")

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _watched(
    name: str,
    trace: list[TraceRequest],
    target: Target,
    records: list[Record],
    concurrency: int | None,
    stop: asyncio.Event,
    console: Console,
) -> None:
    """`replay` with a live progress line. Returns early, with the records so far, after a second ^C."""
    tally = Tally(total=len(trace))
    task = asyncio.current_task()
    watcher = asyncio.create_task(_show(name, tally, console))
    try:
        await replay(trace, target, records, concurrency=concurrency, tally=tally, stop=stop)
    except asyncio.CancelledError:
        if task is None or not stop.is_set():
            raise  # cancelled by somebody else than ^C
        task.uncancel()
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher


async def _show(name: str, tally: Tally, console: Console) -> None:
    """Draw the progress line until cancelled."""
    begun = time.perf_counter()
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        bar = progress.add_task(name, total=tally.total, figures="")
        try:
            while True:
                _draw(progress, bar, tally, time.perf_counter() - begun)
                await asyncio.sleep(0.2)
        finally:
            _draw(progress, bar, tally, time.perf_counter() - begun)


def _draw(progress: Progress, bar: TaskID, tally: Tally, elapsed_s: float) -> None:
    elapsed_s = max(elapsed_s, 1e-6)
    figures = (
        f"{tally.done / elapsed_s:.1f} req/s  {tally.tokens / elapsed_s:.0f} tokens/s  "
        f"{tally.in_flight} in flight  {tally.errors} errors"
    )
    progress.update(bar, completed=tally.done, figures=figures)
