"""Tokens/s against the number of adapters: distinct ones in the batch, or registered ones.

Each experiment starts `chorus serve` itself on random adapters and yields a Sample for each point of each
round. The points change direction from round to round, so that a machine that slows down or speeds up does
not bend the curve.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import track

from load_tests import floor
from load_tests.adapters import DType, byte_width, write_adapters
from load_tests.client import Target
from load_tests.curve import Floor, Sample
from load_tests.report import summarise
from load_tests.runner import run_load
from load_tests.serving import ServerProcess, chorus_serve
from load_tests.trace import Lengths, TraceRequest, TraceSpec, adapter_names, generate

_HEARTBEAT_S = 0.6


class Load(msgspec.Struct, frozen=True):
    """What every point is asked: a closed loop of equally long requests, so that the batch stays full."""

    concurrency: int = 64
    requests: int = 128  # a multiple of concurrency, or the last batch is not full
    prompt_tokens: int = 32
    output_tokens: int = 64
    token_ids: tuple[int, int] = (100, 1000)  # both included; must lie inside the vocabulary
    rounds: int = 3

    def trace(self, adapters: Sequence[str], seed: int, alpha: float | None = None) -> list[TraceRequest]:
        """`adapters` in turns, so that a full batch holds them all; with `alpha`, by Zipf popularity.

        Another seed gives other prompts, so that no KV block is used again.
        """
        spec = TraceSpec(
            requests=self.requests,
            adapters=tuple(adapters),
            alpha=alpha or 0.0,
            prompt_tokens=Lengths("fixed", self.prompt_tokens, self.prompt_tokens),
            output_tokens=Lengths("fixed", self.output_tokens, self.output_tokens),
            token_ids=self.token_ids,
            seed=seed,
        )
        requests = generate(spec)
        if alpha is not None:
            return requests
        turns = [request.id % len(adapters) for request in requests]
        return [
            msgspec.structs.replace(request, adapter=adapters[turn], rank=turn + 1)
            for request, turn in zip(requests, turns, strict=True)
        ]


class Subject(msgspec.Struct, frozen=True):
    """What is measured: `chorus serve` on a model, with random adapters whose ranks take turns."""

    model: Path
    ranks: Sequence[int]
    dtype: DType = "bfloat16"  # of the weights as served, and of the adapters
    flags: Sequence[str] = ()  # more flags of `chorus serve`

    def write_adapters(self, out: Path, names: Sequence[str], console: Console) -> None:
        """The folders of all `names` in `out`."""
        written = write_adapters(self.model, out, names, self.ranks, dtype=self.dtype)
        for _ in track(written, "adapters", total=len(names), console=console):
            pass

    def serve(self, load: Load, data_dir: Path, adapters: Path, log: Path) -> ServerProcess:
        """A server with room for the whole batch."""
        flags = ["--dtype", self.dtype, "--max-num-seqs", str(load.concurrency), *self.flags]
        return chorus_serve(self.model, data_dir, adapters, flags, log)


def distinct(
    subject: Subject, load: Load, points: Sequence[int], logs: Path, console: Console
) -> Iterator[Sample]:
    """Against the number of distinct adapters in a batch of fixed size. One server, all adapters resident."""
    names = adapter_names(max(points))
    with tempfile.TemporaryDirectory(prefix="chorus-scaling-") as folder:
        work = Path(folder)
        subject.write_adapters(work / "adapters", names, console)
        with subject.serve(load, work / "data", work / "adapters", logs / "serve.log") as server:
            _warm(server, load, names)
            for number, adapters in _rounds(points, load.rounds):
                trace = load.trace(names[:adapters], seed=_seed(number, adapters))
                yield _measure(server, load, trace, adapters, number, console)


def registered(
    subject: Subject,
    load: Load,
    points: Sequence[int],
    logs: Path,
    console: Console,
    *,
    working_set: int | None = 10,
    alpha: float = 1.0,
) -> Iterator[Sample]:
    """Against the number of adapters registered, of which `working_set` are asked for; None: any, by Zipf.

    A server for each point of each round. In the first round it registers the folders, later it finds them in
    its data folder: `Sample.ready_s` tells what that costs. A working set is resident before the clock runs,
    and lies evenly among the registered names.
    """
    names = adapter_names(max(points))
    with tempfile.TemporaryDirectory(prefix="chorus-scaling-") as folder:
        work = Path(folder)
        subject.write_adapters(work / "all", names, console)
        for adapters in points:
            _link(work / "all", names[:adapters], work / f"adapters-{adapters}")
        for number, adapters in _rounds(points, load.rounds):
            asked = evenly_spaced(names[:adapters], working_set)
            trace = load.trace(asked, _seed(number, adapters), None if working_set else alpha)
            data, log = work / f"data-{adapters}", logs / f"serve-{adapters}-{number}.log"
            with subject.serve(load, data, work / f"adapters-{adapters}", log) as server:
                _warm(server, load, asked if working_set else asked[:1])
                yield _measure(server, load, trace, adapters, number, console)


def evenly_spaced(names: Sequence[str], count: int | None) -> Sequence[str]:
    """`count` of `names` at even distances; all of them when None or more than there are."""
    if count is None or count >= len(names):
        return names
    return [names[index * len(names) // count] for index in range(count)]


def floors(subject: Subject, load: Load, points: Sequence[int], machine: floor.Machine) -> dict[int, Floor]:
    """The floor of each point of `distinct`; the mean length of a context counts."""
    config = json.loads((subject.model / "config.json").read_text())
    width = byte_width(subject.dtype)
    values = floor.weight_values(subject.model)
    context = load.prompt_tokens + load.output_tokens / 2
    kv = round(width * floor.kv_values(config) * context * load.concurrency)
    result = {}
    for adapters in points:
        ranks = sum(subject.ranks[index % len(subject.ranks)] for index in range(adapters))
        read = floor.StepBytes(width * values, width * floor.adapter_values(config, ranks), kv)
        per_token = values + floor.adapter_values(config, ranks) / adapters
        step_s = machine.step_s(read, per_token * load.concurrency)
        prompts = (per_token - floor.head_values(config)) * load.prompt_tokens * load.concurrency
        batch_s = machine.multiply_s(prompts) + step_s * load.output_tokens
        result[adapters] = Floor(read, step_s, load.concurrency * load.output_tokens / batch_s)
    return result


def _rounds(points: Sequence[int], rounds: int) -> Iterator[tuple[int, int]]:
    """(round, point): there and back again."""
    for number in range(rounds):
        for point in points if number % 2 == 0 else reversed(points):
            yield number, point


def _seed(number: int, adapters: int) -> int:
    return 100_000 * number + adapters


def _link(source: Path, names: Sequence[str], target: Path) -> None:
    """A folder of links: the same adapters at every point, each written once."""
    target.mkdir()
    for name in names:
        (target / name).symlink_to(source / name, target_is_directory=True)


def _warm(server: ServerProcess, load: Load, adapters: Sequence[str]) -> None:
    """Short requests, unmeasured: at least one of each adapter, and a full batch of them.

    Raises RuntimeError when one is not answered.
    """
    brief = msgspec.structs.replace(load, requests=max(len(adapters), load.concurrency), output_tokens=8)
    result = asyncio.run(
        run_load(
            brief.trace(adapters, seed=_seed(load.rounds, len(adapters))),
            Target(server.url),
            label="warm-up",
            concurrency=load.concurrency,
            console=Console(quiet=True),
        )
    )
    if not result.flawless:
        errors = [record.error for record in result.records if record.error]
        raise RuntimeError(f"the warm-up failed: {errors[0] if errors else 'interrupted'}")


def _measure(
    server: ServerProcess, load: Load, trace: list[TraceRequest], adapters: int, number: int, console: Console
) -> Sample:
    """Raises KeyboardInterrupt after ^C, RuntimeError when nothing was answered."""
    loads = _loads(server)
    console.print(f"round {number + 1} of {load.rounds}, {adapters} adapters")
    result = asyncio.run(
        run_load(trace, Target(server.url), label="", concurrency=load.concurrency, console=console)
    )
    if result.interrupted:
        raise KeyboardInterrupt
    report = summarise(result)
    if report.ttft is None or report.inter_token is None:
        raise RuntimeError(f"no request was answered: {report.errors}")
    return Sample(
        adapters=adapters,
        round=number,
        tokens_per_s=report.output_tokens_per_s,
        ttft_p50_s=report.ttft.p50,
        ttft_p95_s=report.ttft.p95,
        inter_token_p50_s=report.inter_token.p50,
        failed=report.planned - report.answered,
        adapter_loads=_loads(server) - loads,
        ready_s=server.ready_s,
    )


def _loads(server: ServerProcess) -> int:
    """Copies into the arena since the server started; an idle engine tells them every half second."""
    time.sleep(_HEARTBEAT_S)
    return round(server.counter("chorus_adapter_loads_total"))
