"""Random lives of a scheduler: whatever comes and goes, the books balance and everyone is served."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import groupby

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from server.messages import AdapterRef, ErrorCode, Fork, Request
from server.scheduling.policy import FairShare, FirstComeFirstServed
from server.scheduling.sequence import Sequence, State
from server.scheduling.step_plan import StepPlan
from tests.scheduling.fake_step import FakeGate, Harness, alone, request

BROKEN = "adapter0"


@dataclass(frozen=True)
class Life:
    """Drawn by hypothesis, so that a failure shrinks to a small one."""

    seed: int
    steps: int
    num_blocks: int
    block_size: int
    budget: int
    max_num_seqs: int
    adapters: int
    capacity: int
    copy_steps: int
    prefix_caching: bool
    arrivals: float  # mean, each step
    troubles: float  # chance of an abort, a failure or a lost step, each step
    ahead: bool = False  # whether steps are planned before the one before is read
    fair: bool = True
    tenants: int = 1


LIVES = st.builds(
    Life,
    seed=st.integers(0, 2**32),
    steps=st.integers(1, 40),
    num_blocks=st.integers(2, 24),
    block_size=st.sampled_from([1, 2, 4]),
    budget=st.integers(1, 24),
    max_num_seqs=st.integers(1, 8),
    adapters=st.integers(0, 6),
    capacity=st.integers(1, 3),
    copy_steps=st.integers(0, 3),
    prefix_caching=st.booleans(),
    arrivals=st.floats(0.1, 2.0),
    troubles=st.sampled_from([0.0, 0.0, 0.3]),
    ahead=st.booleans(),
    fair=st.booleans(),
    tenants=st.integers(1, 4),
)


class TraceHarness(Harness):
    """Checks every plan and every state between steps."""

    def __init__(self, life: Life) -> None:
        super().__init__(
            num_blocks=life.num_blocks,
            block_size=life.block_size,
            gate=FakeGate(life.capacity, life.copy_steps, broken=frozenset({BROKEN})),
            prefix_caching=life.prefix_caching,
            max_num_seqs=life.max_num_seqs,
            max_num_batched_tokens=life.budget,
            max_model_len=40,
            patience_s=0.5,
            ahead=life.ahead,
            policy=FairShare(ageing_s=1.0) if life.fair else FirstComeFirstServed(),
        )
        self.life = life
        self.rng = random.Random(life.seed)
        self.log: list[list[tuple[str, int, int]]] = []
        self.gone: set[str] = set()  # aborted

    def live(self) -> list[Sequence]:
        return [seq for seq in self.sequences.values() if seq.state is not State.FINISHED]

    def random_request(self) -> Request:
        rng = self.rng
        wanted = rng.randint(0, 2) if self.life.adapters else 0
        mix = {f"adapter{rng.randrange(self.life.adapters)}" for _ in range(wanted)}
        name = f"r{len(self.sequences)}"
        alone_ = request(
            name,
            [rng.choice([1, 1, 2]) for _ in range(rng.randint(1, 30))],
            *(AdapterRef(digest, "/", rng.choice([1.0, 1.0, 0.5])) for digest in sorted(mix)),
            max_tokens=rng.choice([0, *range(1, 13)]),
            prompt_logprobs=rng.choice([None, None, 2]),
            ignore_eos=rng.random() < 0.5,
            min_tokens=rng.randint(0, 4),
            stop_token_ids=(4,) if rng.random() < 0.2 else (),
            seed=1,
        )
        forks = rng.choice([0, 0, 0, 1, 4])
        tenant = rng.randrange(self.life.tenants)
        return msgspec.structs.replace(
            alone_,
            forks=tuple(Fork(f"{name}.{k}") for k in range(forks)),
            tenant=f"tenant{tenant}",
            weight=float(1 + tenant),
            priority=rng.choice([0, 0, 0, 3, -1]),
            timeout_s=rng.choice([None] * 9 + [1.5]),
        )

    def trouble(self) -> None:
        rng = self.rng
        if not self.live():
            return
        victim = rng.choice(self.live()).request_id
        kind = rng.randrange(5)
        if kind == 0:
            assert self.scheduler.abort(victim)
            self.gone.add(victim)
        elif kind == 1:
            failed = self.scheduler.fail(victim, ErrorCode.INTERNAL, "by chance")
            assert failed is not None
            self.collect([failed])
        elif kind == 2:
            if not self.scheduler.can_plan_ahead:
                self.read()
            self.collect(self.scheduler.plan().failed)  # the step is lost
        elif kind == 3:
            self.read()
            self.scheduler.preempt()
        else:  # memory runs out, and what is in flight is lost
            self.in_flight.clear()
            ended = [output for _ in range(rng.choice([1, 4])) for output in self.scheduler.make_way()]
            assert all(output.error is ErrorCode.OUT_OF_MEMORY for output in ended)
            self.collect(ended)
            self.collect(self.scheduler.plan(admit=False).failed)

    def step(self) -> StepPlan:
        running = [seq for seq in self.live() if seq.state is State.RUNNING]
        oldest = min(running, key=lambda seq: seq.order, default=None)
        before = oldest.num_computed if oldest else 0
        prefilling = oldest is not None and oldest.num_tokens - before > 1  # may have to wait for tokens
        plan = super().step()
        self.check_plan(plan)
        self.check_books()
        if oldest and oldest.state is not State.FINISHED and not self.life.fair:
            assert oldest.state is State.RUNNING, "the oldest is never preempted"
            assert oldest.num_computed > before or prefilling or oldest.is_full
        return plan

    def check_plan(self, plan: StepPlan) -> None:
        life = self.life
        assert sum(run.num_tokens for run in plan.runs) <= life.budget
        assert len(plan.runs) <= life.max_num_seqs
        assert len({run.seq for run in plan.runs}) == len(plan.runs)
        assert all(run.num_tokens > 0 for run in plan.runs)
        mixes = [mix for mix, _ in groupby(run.seq.mix_key for run in plan.runs)]
        assert len(mixes) == len(set(mixes)), "a mix in two places"
        assert () not in mixes[:-1], "the base model is not last"
        self.log.append([(run.seq.request_id, run.start, run.num_tokens) for run in plan.runs])

    def check_books(self) -> None:
        pool, scheduler = self.pool, self.scheduler
        assert pool.free + pool.cached + pool.held == pool.num_blocks
        running = [seq for seq in self.live() if seq.state is State.RUNNING]
        waiting = [seq for seq in self.live() if seq.state is not State.RUNNING]
        holders: dict[int, list[tuple[Sequence, int]]] = {}
        for seq in running:
            assert len(set(seq.block_ids)) == len(seq.block_ids)
            assert seq.num_computed <= len(seq.block_ids) * pool.block_size
            for i, block in enumerate(seq.block_ids):
                holders.setdefault(block, []).append((seq, i))
        prompts = scheduler._prompts
        kept = {block for group in prompts._kept for block in group.block_ids}
        kept |= {source for source, _ in prompts.copies}
        assert pool.held == len(holders.keys() | kept)
        assert all(group.waiting and group.leader is None for group in prompts._kept)
        assert set(prompts._copies) <= set(running)
        for sharing in holders.values():
            if len(sharing) > 1:
                first, _ = sharing[0]
                for seq, i in sharing:
                    end = (i + 1) * pool.block_size
                    assert seq.num_computed >= end, "a shared block that is not full"
                    assert (seq.mix_key, seq.tenant) == (first.mix_key, first.tenant)
                    assert seq.tokens[:end].tolist() == first.tokens[:end].tolist()
        assert all(not seq.block_ids and seq.num_computed == 0 for seq in waiting)
        assert +self.gate.references == Counter(d for seq in running for d, _ in seq.mix_key)
        assert scheduler.running == len(running)
        assert scheduler.waiting == len(waiting)
        passed_over = sum(seq.state is State.WAITING_FOR_ADAPTER for seq in waiting)
        assert scheduler.waiting_for_adapter == passed_over
        assert set(scheduler.waiting_digests) == {d for seq in waiting for d, _ in seq.mix_key}
        assert scheduler.has_work == bool(self.live())

    def live_through(self) -> None:
        for _ in range(self.life.steps):
            while self.rng.random() < self.life.arrivals / (1 + self.life.arrivals):
                self.add(self.random_request())
            if self.rng.random() < self.life.troubles:
                self.trouble()
                self.check_books()
            self.step()
        self.drain(500 + 100 * len(self.sequences))  # with a budget of one token a step it takes that long


@settings(max_examples=300, deadline=None)
@given(life=LIVES)
def test_books_balance_and_everyone_ends_once(life: Life) -> None:
    h = TraceHarness(life)
    h.live_through()
    assert h.pool.held == 0
    assert not +h.gate.references
    assert h.scheduler.waiting_digests == ()
    policy = h.scheduler._policy
    if isinstance(policy, FairShare):
        assert (policy._adapters, policy._weights, policy._classes) == ({}, {}, {})
        assert not policy._tenants.are_running | policy._tenants.are_waiting
    fed = sum(len(h.tokens(name)) for name in h.requests)
    assert h.scheduler.generated_tokens == fed
    for name, item in h.requests.items():
        ends = [output.finish_reason for output in h.outputs[name] if output.finish_reason]
        scored = [entry.token_id for output in h.outputs[name] for entry in output.prompt_logprobs or ()]
        asked = item.sampling.prompt_logprobs is not None and name == item.request_id
        in_whole = item.prompt_token_ids[1:] if asked else []
        assert scored == (in_whole if ends not in ([], ["error"]) else in_whole[: len(scored)])
        assert len(ends) == (0 if name in h.gone else 1)
        if ends and ends != ["error"]:
            assert (h.tokens(name), ends[0]) == alone(item, h.max_model_len)
        elif ends and not life.troubles:
            never_fits = h.outputs[name][0].error is ErrorCode.NEVER_FITS
            late = h.outputs[name][-1].error is ErrorCode.DEADLINE_EXCEEDED
            assert not late or item.timeout_s is not None
            unloadable = len(item.adapters) > life.capacity or BROKEN in {a.digest for a in item.adapters}
            assert never_fits or unloadable or late


@settings(max_examples=100, deadline=None)
@given(life=LIVES)
def test_every_token_is_computed_or_taken_from_the_cache_once(life: Life) -> None:
    h = TraceHarness(life)
    h.live_through()
    computed = cached = 0
    for name, item in h.requests.items():
        seq = h.sequences[name]
        if h.reason(name) in ("stop", "length") and not seq.num_preemptions:
            prompt = len(item.prompt_token_ids)
            taken = h.outputs[name][0].cached_tokens
            assert taken < prompt
            assert taken % life.block_size == 0
            of_prompt = h.model.computed_of_prompt[name]
            # all but the last token may be another choice's
            assert of_prompt + taken == prompt or (seq.group is not None and of_prompt == 1)
            for_nothing = h.model.computed[name] - of_prompt - max(len(h.tokens(name)) - 1, 0)
            assert for_nothing in ((0, 1) if life.ahead and h.reason(name) == "stop" else (0,))
            computed += of_prompt
            cached += taken
    assert h.scheduler.prompt_tokens >= computed
    assert h.scheduler.cached_prompt_tokens >= cached
    late = any(o.error is ErrorCode.DEADLINE_EXCEEDED for each in h.outputs.values() for o in each)
    if not (h.scheduler.preemptions or life.troubles or late):
        assert (h.scheduler.prompt_tokens, h.scheduler.cached_prompt_tokens) == (computed, cached)
    if not life.prefix_caching:
        assert h.scheduler.cached_prompt_tokens == 0


@settings(max_examples=30, deadline=None)
@given(life=LIVES)
def test_the_same_life_gives_the_same_plans(life: Life) -> None:
    first, second = TraceHarness(life), TraceHarness(life)
    first.live_through()
    second.live_through()
    assert first.log == second.log


def test_the_traces_reach_the_hard_cases() -> None:
    """Guards the generator: lives of this kind preempt, share prefixes and run out of arena room."""
    preemptions = cached = copies = 0
    errors = Counter[ErrorCode | None]()
    for seed in range(20):
        h = TraceHarness(Life(seed, 40, 14, 2, 12, 6, 6, 2, 1, True, 1.0, 0.1, fair=seed % 2 == 0, tenants=2))
        h.live_through()
        errors.update(output.error for outputs in h.outputs.values() for output in outputs)
        preemptions += h.scheduler.preemptions
        cached += h.scheduler.cached_prompt_tokens
        copies += h.gate.copies
    assert preemptions > 20
    assert cached > 60
    assert copies > 60
    assert errors[ErrorCode.DEADLINE_EXCEEDED] > 20
    assert errors[ErrorCode.OUT_OF_MEMORY] > 0
