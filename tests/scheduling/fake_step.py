"""What a scheduler needs around it to run with no model: an arena of a few places, and a cache that tells."""

from __future__ import annotations

from collections import Counter, OrderedDict

from server.messages import AdapterRef, ErrorCode, Logprobs, Request, SamplingParams, TokenOutput
from server.scheduling.adapter_gate import Acquire, AcquireStatus
from server.scheduling.block_pool import BlockPool
from server.scheduling.policy import Policy
from server.scheduling.prompt_group import sequences_of
from server.scheduling.scheduler import Scheduler
from server.scheduling.sequence import MixKey, Sequence
from server.scheduling.step_plan import ScheduledRun, StepPlan

EOS = 0
VOCABULARY = 9


class FakeGate:
    """An arena with room for `capacity` adapters; a copy takes `copy_steps` calls of `tick`.

    Checks that the scheduler keeps to the protocol: references go back exactly once, and a mix that
    cannot be loaded or was passed over holds none.
    """

    def __init__(
        self,
        capacity: int,
        copy_steps: int = 0,
        broken: frozenset[str] = frozenset(),
        pinned: frozenset[str] = frozenset(),
    ) -> None:
        self.capacity = capacity
        self.copy_steps = copy_steps
        self.broken = broken
        self.pinned = pinned
        self.copying: dict[str, int] = {}
        self.resident: OrderedDict[str, None] = OrderedDict((digest, None) for digest in sorted(pinned))
        self.references: Counter[str] = Counter()
        self.promises: set[frozenset[str]] = set()  # kept until asked for again
        self.prefetched: list[str] = []
        self.cancelled: list[tuple[str, ...]] = []
        self.copies = 0
        assert len(pinned) <= capacity

    def prefetch(self, ref: AdapterRef) -> None:
        self.prefetched.append(ref.digest)
        known = ref.digest in self.resident or ref.digest in self.copying or ref.digest in self.broken
        if not known and len(self.resident) + len(self.copying) < self.capacity:
            self._copy(ref.digest)

    def acquire(self, refs: tuple[AdapterRef, ...]) -> Acquire:
        assert refs, "the base model needs no adapter"
        digests = [ref.digest for ref in refs]
        if self.broken & set(digests) or len(set(digests)) > self.capacity:
            return Acquire(AcquireStatus.FAILED, ErrorCode.ADAPTER_LOAD_FAILED, "no such adapter")
        self.promises.discard(frozenset(digests))
        missing = [d for d in digests if d not in self.resident and d not in self.copying]
        in_use = self.pinned.union(+self.references, digests, *self.promises)
        idle = [digest for digest in self.resident if digest not in in_use]
        room = self.capacity - len(self.resident) - len(self.copying)
        if len(missing) > room + len(idle):
            return Acquire(AcquireStatus.FULL)
        for digest in idle[: max(0, len(missing) - room)]:
            del self.resident[digest]
        for digest in missing:
            self._copy(digest)
        if any(digest in self.copying for digest in digests):
            self.promises.add(frozenset(digests))
            return Acquire(AcquireStatus.PENDING)
        self.references.update(digests)
        for digest in digests:
            self.resident.move_to_end(digest)
        return Acquire(AcquireStatus.READY)

    def release(self, refs: tuple[AdapterRef, ...]) -> None:
        for ref in refs:
            assert self.references[ref.digest] > 0, f"{ref.digest} given back once too often"
            self.references[ref.digest] -= 1

    def cancel(self, refs: tuple[AdapterRef, ...]) -> None:
        assert refs
        self.cancelled.append(tuple(ref.digest for ref in refs))
        self.promises.discard(frozenset(ref.digest for ref in refs))

    def tick(self) -> None:
        for digest in list(self.copying):
            self.copying[digest] -= 1
            if self.copying[digest] <= 0:
                del self.copying[digest]
                self.resident[digest] = None

    def _copy(self, digest: str) -> None:
        self.copies += 1
        if self.copy_steps:
            self.copying[digest] = self.copy_steps
        else:
            self.resident[digest] = None


def scores_of(run: ScheduledRun) -> list[Logprobs]:
    """That tell where they are from."""
    return [Logprobs(int(run.seq.tokens[at + 1]), float(-at), []) for at in run.scored]


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def next_token(tokens: list[int], mix: MixKey) -> int:
    """What the fake model says after `tokens` under `mix`: any of VOCABULARY, EOS among them."""
    digest_sum = sum(ord(character) for digest, _ in mix for character in digest)
    weights = sum(int(weight * 4) for _, weight in mix)
    return (sum((i + 1) * t for i, t in enumerate(tokens)) * 7 + digest_sum + 3 * weights) % VOCABULARY


class FakeModel:
    """Keeps, for each place in the paged cache, what K and V there would depend on: the tokens up to it
    and the adapter mix. Fails when a run reads a place that holds anything else than its own past.

    Knows the tokens that it gave even where the scheduler has not read them yet."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.cache: dict[tuple[int, int], object] = {}
        self.num_blocks = num_blocks
        self.computed: Counter[str] = Counter()  # tokens, by request
        self.computed_of_prompt: Counter[str] = Counter()
        self._given: dict[Sequence, list[int]] = {}

    def __call__(self, plan: StepPlan) -> list[list[int]]:
        for source, target in plan.copies:
            for place in range(self.block_size):
                self.cache[target, place] = self.cache.get((source, place))
        for run in plan.runs:
            for position in range(run.start, run.start + run.num_tokens):
                self.cache[self._place(run.seq, position)] = self._past(run.seq, position)
            self.computed[run.seq.request_id] += run.num_tokens
            of_prompt = min(run.num_tokens, run.seq.num_prompt_tokens - run.start)
            self.computed_of_prompt[run.seq.request_id] += max(0, of_prompt)
        sampled = []
        for run in plan.runs:
            end = run.start + run.num_tokens
            for position in range(end):
                assert self.cache[self._place(run.seq, position)] == self._past(run.seq, position)
            sampled.append([next_token(self._tokens(run.seq), run.mix)] * run.rows)
        for run, tokens in zip(plan.runs, sampled, strict=True):
            self._given.setdefault(run.seq, []).extend(tokens)
        return sampled

    def _tokens(self, seq: Sequence) -> list[int]:
        known: list[int] = seq.tokens[: seq.num_tokens - seq.num_unread].tolist()
        return known + (self._given[seq][-seq.num_unread :] if seq.num_unread else [])

    def _place(self, seq: Sequence, position: int) -> tuple[int, int]:
        block = seq.block_ids[position // self.block_size]
        assert 0 <= block < self.num_blocks
        return block, position % self.block_size

    def _past(self, seq: Sequence, position: int) -> object:
        return seq.mix_key, tuple(self._tokens(seq)[: position + 1])


def alone(request: Request, max_model_len: int) -> tuple[list[int], str]:
    """The tokens and finish reason that a request gets with nobody beside it."""
    sampling = request.sampling
    mix = tuple((ref.digest, ref.weight) for ref in request.adapters)
    tokens = list(request.prompt_token_ids)
    output: list[int] = []
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
    while sampling.max_tokens:
        token = next_token(tokens, mix)
        tokens.append(token)
        output.append(token)
        if token in stops and len(output) >= sampling.min_tokens:
            return output, "stop"
        if len(output) >= sampling.max_tokens or len(tokens) >= max_model_len:
            return output, "length"
    return output, "length"


def request(
    name: str, prompt: list[int] | int, *adapters: str | AdapterRef, max_tokens: int = 4, **sampling: object
) -> Request:
    """A request whose prompt is given or, as a number, has that many tokens; runs to its limit by default."""
    ids = [1 + (ord(name[-1]) + i) % 5 for i in range(prompt)] if isinstance(prompt, int) else prompt
    params = SamplingParams(max_tokens=max_tokens, **{"ignore_eos": True, **sampling})  # type: ignore[arg-type]  # free-form
    refs = tuple(AdapterRef(a, f"/{a}") if isinstance(a, str) else a for a in adapters)
    return Request(name, ids, params, refs)


class Harness:
    """A scheduler with a fake gate, model and clock; `step` runs one plan and collects what comes out.

    `ahead`: a step is planned and launched before the one before is read, where the scheduler can."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        gate: FakeGate | None = None,
        prefix_caching: bool = True,
        seconds_per_step: float = 0.1,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 32,
        max_model_len: int = 256,
        patience_s: float = 2.0,
        max_scored_tokens: int = 5,
        ahead: bool = False,
        policy: Policy | None = None,
    ) -> None:
        self.clock = Clock()
        self.seconds_per_step = seconds_per_step
        self.pool = BlockPool(num_blocks, block_size, prefix_caching)
        self.gate = gate or FakeGate(capacity=4)
        self.model = FakeModel(num_blocks, block_size)
        self.max_model_len = max_model_len
        self.scheduler = Scheduler(
            self.pool,
            self.gate,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            max_scored_tokens=max_scored_tokens,
            eos_token_ids=[EOS],
            policy=policy,
            patience_s=patience_s,
            clock=self.clock,
        )
        self.ahead, self.max_scored_tokens = ahead, max_scored_tokens
        self.in_flight: list[tuple[StepPlan, list[list[int]]]] = []
        self.sequences: dict[str, Sequence] = {}
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.started: dict[str, float] = {}  # request -> second of its first run

    def add(self, *requests: Request) -> list[Sequence]:
        """Their sequences, forks after the request that they belong to."""
        added = []
        for item in requests:
            for seq in sequences_of(item, self.clock(), order=len(self.sequences)):
                self.sequences[seq.request_id] = seq
                self.requests[seq.request_id] = item
                self.outputs[seq.request_id] = []
                refused = self.scheduler.add(seq)
                if refused is not None:
                    self.collect([refused])
                added.append(seq)
        return added

    def collect(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            before = self.outputs[output.request_id]
            assert not any(earlier.finish_reason for earlier in before), "an output after the terminal one"
            before.append(output)

    def step(self) -> StepPlan:
        self.clock.now += self.seconds_per_step
        self.gate.tick()
        if not self.scheduler.can_plan_ahead:
            self.read()
        plan = self.scheduler.plan()
        for run in plan.runs:
            self.started.setdefault(run.seq.request_id, self.clock())
        self.collect(plan.failed)
        tokens = self.model(plan)
        scored = [run for run in plan.runs if run.scored]
        assert sum(len(run.scored) for run in scored) <= self.max_scored_tokens
        ahead = self.ahead and not scored  # as the engine does
        if ahead:
            self.scheduler.launched(plan)
        self.read()
        self.in_flight.append((plan, tokens))
        if not ahead:
            self.read()
        return plan

    def read(self) -> None:
        """What the steps in flight gave."""
        while self.in_flight:
            plan, tokens = self.in_flight.pop(0)
            self.collect(self.scheduler.update(plan, tokens, None, [scores_of(run) for run in plan.runs]))

    def drain(self, limit: int = 2000) -> int:
        """Step until nothing is left; returns how many steps that took."""
        for steps in range(limit):
            if not self.scheduler.has_work:
                return steps
            self.step()
        raise AssertionError(f"still at work after {limit} steps: {self.scheduler.request_ids}")

    def tokens(self, name: str) -> list[int]:
        return [token for output in self.outputs[name] for token in output.token_ids]

    def reason(self, name: str) -> str | None:
        return self.outputs[name][-1].finish_reason if self.outputs[name] else None
