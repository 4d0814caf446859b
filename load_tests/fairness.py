"""How long a steady tenant waits for its first tokens while another asks for many times as much.

Two tenants send requests of the same kind at random times (Poisson). At load 1 both ask for the same, and
together for a part of what the engine can do; then the loud one asks for `load` times as much. `simulate`
runs the real Scheduler with steps that take as long as a formula says, `serve` the real engine process.
Neither goes through the HTTP face, whose bounded queue would refuse most of what the loud tenant sends.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from load_tests.engine_overhead import AllResident
from load_tests.rendering import Rows, new_plot, write_plot
from server.border.client import ProcessEngineClient
from server.config import Settings
from server.messages import Request, SamplingParams
from server.scheduling.block_pool import BlockPool
from server.scheduling.policy import new_policy
from server.scheduling.scheduler import Scheduler
from server.scheduling.sequence import Sequence as Running

PolicyName = Literal["fair", "fcfs"]
POLICIES: tuple[PolicyName, ...] = ("fair", "fcfs")
STEADY, LOUD = "steady", "loud"

_PROMPT_TOKENS, _OUTPUT_TOKENS = (16, 64), (16, 48)  # each drawn between these
_BLOCK_SIZE = 16
_STEP_S, _TOKEN_S = 0.010, 0.0002  # a simulated step: at least, and for each of its tokens
_WARM_SHARE = 0.2  # of the time, at its start, whose requests do not count


class Ask(msgspec.Struct, frozen=True, order=True):
    """One request of a tenant, `at` seconds after the start."""

    at: float
    tenant: str
    name: str
    prompt: list[int]
    tokens: int

    def request(self) -> Request:
        sampling = SamplingParams(max_tokens=self.tokens, temperature=0.0, ignore_eos=True)
        return Request(self.name, self.prompt, sampling, tenant=self.tenant)


class Point(msgspec.Struct, frozen=True):
    """What the two tenants got at one load of the loud one. Times of first tokens in seconds."""

    policy: str
    load: float
    steady_p50: float
    steady_p99: float
    loud_p50: float
    steady_requests: int  # that count
    steady_unserved: int  # of these, without a first token when the time was over
    output_tokens_per_s: float


class Fairness(msgspec.Struct, frozen=True):
    """All points of one kind: simulated, or of the real engine."""

    kind: str
    places: int
    seconds: float
    capacity: float  # requests/s
    utilisation: float  # of it, by both tenants at load 1
    points: list[Point]

    def moved(self, policy: str) -> float:
        """The steady tenant's p99 at the largest load over that at the smallest."""
        points = sorted((p for p in self.points if p.policy == policy), key=lambda p: p.load)
        return points[-1].steady_p99 / points[0].steady_p99


def asks_of(rates: dict[str, float], seconds: float, seed: int, vocabulary: int = 256) -> list[Ask]:
    """Poisson arrivals of each tenant at its rate (requests/s), in order. A tenant's own do not depend on the
    other's rate."""
    streams = []
    for at, (tenant, rate) in enumerate(sorted(rates.items())):
        streams.append(_asks(tenant, rate, seconds, np.random.default_rng((seed, at)), vocabulary))
    return list(heapq.merge(*streams))


def _asks(
    tenant: str, rate: float, seconds: float, rng: np.random.Generator, vocabulary: int
) -> Iterable[Ask]:
    at = 0.0
    for number in itertools.count():
        at += rng.exponential(1 / rate)
        if at > seconds:
            return
        prompt = rng.integers(3, vocabulary, rng.integers(*_PROMPT_TOKENS)).tolist()
        yield Ask(at, tenant, f"{tenant}{number}", prompt, int(rng.integers(*_OUTPUT_TOKENS)))


class Outcome:
    """When each request had its first token, and how many tokens there were. Seconds from the start."""

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.tokens = 0

    def point(self, policy: str, load: float, asks: Sequence[Ask], seconds: float) -> Point:
        counted = [ask for ask in asks if ask.at > _WARM_SHARE * seconds]
        waits: dict[str, list[float]] = {STEADY: [], LOUD: []}
        for ask in counted:  # one without a token has waited until now at least
            waits[ask.tenant].append(self.first.get(ask.name, seconds) - ask.at)
        unserved = sum(ask.tenant == STEADY and ask.name not in self.first for ask in counted)
        p50, p99 = np.percentile(waits[STEADY], (50, 99)).tolist()
        return Point(
            policy,
            load,
            p50,
            p99,
            float(np.percentile(waits[LOUD], 50)),
            len(waits[STEADY]),
            unserved,
            self.tokens / seconds,
        )


# -- the scheduler alone


def simulate(
    loads: Sequence[float], *, places: int, seconds: float, utilisation: float, seed: int = 0
) -> Fairness:
    """Every load under every policy, in simulated seconds."""
    capacity = _simulated_capacity(places)
    points = []
    for policy, load in itertools.product(POLICIES, loads):
        asks = asks_of(_rates(capacity, utilisation, load), seconds, seed)
        points.append(_simulated(policy, asks, places, seconds).point(policy, load, asks, seconds))
    return Fairness("simulated", places, seconds, capacity, utilisation, points)


def _rates(capacity: float, utilisation: float, load: float) -> dict[str, float]:
    each = utilisation * capacity / 2
    return {STEADY: each, LOUD: load * each}


def _simulated_capacity(places: int) -> float:
    """Requests/s, with all places in use."""
    asks = [msgspec.structs.replace(ask, at=0.0) for ask in asks_of({LOUD: 100.0}, 20.0, seed=1)]
    outcome = _simulated("fcfs", asks, places, 5.0)
    return outcome.tokens / 5.0 / (sum(ask.tokens for ask in asks) / len(asks))


def _simulated(policy: PolicyName, asks: Sequence[Ask], places: int, seconds: float) -> Outcome:
    """Until that time; what is left then is left."""
    now, outcome, ahead = 0.0, Outcome(), 0
    longest, budget = _PROMPT_TOKENS[1] + _OUTPUT_TOKENS[1], 256 + places
    scheduler = Scheduler(
        BlockPool(2 * places * longest // _BLOCK_SIZE, _BLOCK_SIZE),
        AllResident(),
        max_num_seqs=places,
        max_num_batched_tokens=budget,
        max_model_len=longest + 1,
        policy=new_policy(policy, budget),
        clock=lambda: now,
    )
    while now < seconds:
        while ahead < len(asks) and asks[ahead].at <= now:
            scheduler.add(Running(asks[ahead].request(), now, ahead))
            ahead += 1
        plan = scheduler.plan()
        now += _STEP_S + _TOKEN_S * sum(run.num_tokens for run in plan.runs)
        for output in scheduler.update(plan, [[3] * run.rows for run in plan.runs]):
            outcome.first.setdefault(output.request_id, now)
            outcome.tokens += len(output.token_ids)
    return outcome


# -- the real engine


async def serve(
    model: Path, loads: Sequence[float], *, places: int, seconds: float, utilisation: float, seed: int = 0
) -> Fairness:
    """Every load under every policy, each on an engine process of its own."""
    capacity = await _served_capacity(model, places)
    points = []
    for load, policy in itertools.product(loads, POLICIES):
        asks = asks_of(_rates(capacity, utilisation, load), seconds, seed)
        outcome = await _served(_settings(model, policy, places), asks, seconds)
        points.append(outcome.point(policy, load, asks, seconds))
    return Fairness("real engine", places, seconds, capacity, utilisation, points)


def _settings(model: Path, policy: PolicyName, places: int) -> Settings:
    return Settings(model=str(model), scheduling_policy=policy, max_num_seqs=places)


async def _served_capacity(model: Path, places: int) -> float:
    asks = [msgspec.structs.replace(ask, at=0.0) for ask in asks_of({LOUD: 8.0 * places}, 10.0, seed=1)]
    outcome = await _served(_settings(model, "fcfs", places), asks, 8.0)
    return outcome.tokens / 8.0 / (sum(ask.tokens for ask in asks) / len(asks))


async def _served(settings: Settings, asks: Sequence[Ask], seconds: float) -> Outcome:
    engine = ProcessEngineClient(settings)
    await engine.start()
    try:
        await engine.wait_ready()
        outcome, begun = Outcome(), time.monotonic()
        tasks = []
        for ask in asks:
            await asyncio.sleep(max(0.0, begun + ask.at - time.monotonic()))
            tasks.append(asyncio.create_task(_follow(engine, ask, outcome, begun)))
        await asyncio.sleep(max(0.0, begun + seconds - time.monotonic()))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return outcome
    finally:
        await engine.stop()


async def _follow(engine: ProcessEngineClient, ask: Ask, outcome: Outcome, begun: float) -> None:
    async with aclosing(engine.generate(ask.request())) as outputs:
        async for output in outputs:
            outcome.first.setdefault(ask.name, time.monotonic() - begun)
            outcome.tokens += len(output.token_ids)


# -- what it says


def rows(result: Fairness) -> Rows:
    """A table of all points."""
    lines = [["policy", "load of the loud tenant", "steady TTFT p50", "p99", "loud TTFT p50", "tokens/s"]]
    for point in result.points:
        times = [f"{1000 * s:.0f} ms" for s in (point.steady_p50, point.steady_p99, point.loud_p50)]
        lines.append([point.policy, f"{point.load:g}", *times, f"{point.output_tokens_per_s:.0f}"])
    return lines


def plot(result: Fairness, path: Path) -> None:
    """The steady tenant's p99 over the loud one's load, a line for each policy."""
    title = f"TTFT of a steady tenant beside a loud one ({result.kind}, {result.places} places)"
    figure, axes = new_plot(title, "load of the loud tenant, times its fair share", "TTFT p99, s")
    for policy in POLICIES:
        points = sorted((p for p in result.points if p.policy == policy), key=lambda p: p.load)
        axes.plot([p.load for p in points], [p.steady_p99 for p in points], marker="o", label=policy)
    axes.set(xscale="log", yscale="log")
    write_plot(path, figure)
