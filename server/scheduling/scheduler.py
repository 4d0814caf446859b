"""What runs in the next step.

Continuous batching (Yu et al. 2022, Orca) under a token budget with chunked prefill (Agrawal et al. 2024,
Sarathi-Serve) over paged KV blocks, with arena room for adapters as a third thing that an admitted sequence
must have. Holds no tensor and starts no thread: a step is `plan`, the runner's work, `update`. Where the
device works beside the host, `launched` lets the next step be planned before this one's tokens are known.
"""

from __future__ import annotations

import time
from collections import abc

from server.messages import ErrorCode, Logprobs, TokenOutput
from server.scheduling.adapter_gate import AcquireStatus, AdapterGate
from server.scheduling.adapter_turns import AdapterTurns
from server.scheduling.block_pool import BlockPool
from server.scheduling.deadlines import Deadlines
from server.scheduling.flight import Flight
from server.scheduling.policy import FirstComeFirstServed, Policy
from server.scheduling.prompt_group import SharedPrompts
from server.scheduling.refusals import TOO_LARGE, late, never_fits, refusal
from server.scheduling.running import Running
from server.scheduling.sequence import Sequence, State
from server.scheduling.sequence_blocks import SequenceBlocks
from server.scheduling.step_plan import ScheduledRun, StepPlan
from server.scheduling.waiting_line import WaitingLine


class Scheduler:
    """Decides what runs, and keeps count of blocks and adapter references for it.

    Every added sequence gets exactly one terminal TokenOutput (from `add`, `plan`, `update` or `fail`), one
    that is aborted none. A plan that is never updated, because its step failed, is simply planned again.

    max_num_batched_tokens: tokens of one step. At most that many sequences run, so that each gets one.
    max_scored_tokens: of a step, those whose logits are wanted for the prompt's own sake.
    patience_s: how long one may be passed over for want of arena room before others wait for it.
    eos_token_ids: tokens that end any sequence that does not ignore them.
    """

    def __init__(
        self,
        pool: BlockPool,
        gate: AdapterGate,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_scored_tokens: int = 2**31,
        eos_token_ids: abc.Iterable[int] = (),
        policy: Policy | None = None,
        patience_s: float = 2.0,
        clock: abc.Callable[[], float] = time.monotonic,
    ) -> None:
        if min(max_num_seqs, max_num_batched_tokens, max_model_len) < 1:
            raise ValueError("max_num_seqs, max_num_batched_tokens and max_model_len must be positive")
        self._pool = pool
        self._gate = gate
        self._max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._policy = policy or FirstComeFirstServed()
        self._clock = clock

        self._sequences: dict[str, Sequence] = {}  # all that have not ended
        self._deadlines = Deadlines(self._sequences)
        self._line = WaitingLine(patience_s, self._policy)
        self._running = Running(pool.block_size, max_scored_tokens)
        self._prompts = SharedPrompts(pool)
        self._blocks = SequenceBlocks(pool, self._prompts)
        self._flight = Flight()
        self._is_owed_a_place = False  # somebody who waits, once no step is in flight

        self.preemptions = 0
        self.prompt_tokens = 0  # computed so far; prefix hits not counted
        self.generated_tokens = 0

    # -- what there is

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        """All that wait, those for an adapter among them."""
        return len(self._line)

    @property
    def waiting_for_adapter(self) -> int:
        return self._line.for_adapter

    @property
    def waiting_digests(self) -> tuple[str, ...]:
        return self._line.digests

    @property
    def running_digests(self) -> tuple[str, ...]:
        return self._running.digests

    @property
    def prefix_query_tokens(self) -> int:
        """Looked up in the prefix cache so far."""
        return self._blocks.looked_up_tokens

    @property
    def cached_prompt_tokens(self) -> int:
        """Taken from the prefix cache so far."""
        return self._blocks.cached_tokens

    @property
    def next_deadline(self) -> float | None:
        """The earliest of a sequence here, seconds of the clock."""
        return self._deadlines.next

    @property
    def request_ids(self) -> list[str]:
        """Of every sequence that has not ended."""
        return list(self._sequences)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def runnable(self) -> bool:
        """Whether `plan` may have something to run. If not, all there is waits for adapters."""
        return bool(self._running) or len(self._line) > self._line.for_adapter

    @property
    def can_plan_ahead(self) -> bool:
        """Whether the next plan needs no token of those in flight: nobody would have to make room."""
        return self._running.growing <= self._pool.available and not self._is_owed_a_place

    # -- coming and going

    def add(self, seq: Sequence) -> TokenOutput | None:
        """Put in line and start bringing its adapters near. Returns its terminal output if it can never
        run here, else None. Raises ValueError when its request id is in use."""
        if seq.request_id in self._sequences:
            raise ValueError(f"request {seq.request_id} is already here")
        seq.limit(self._eos_token_ids, self._max_model_len)
        if problem := never_fits(seq, self._pool, self._max_model_len):
            seq.state = State.FINISHED
            return refusal(seq, ErrorCode.NEVER_FITS, problem)
        self._sequences[seq.request_id] = seq
        self._deadlines.add(seq)
        self._wait(seq)
        for ref in seq.adapters:
            self._gate.prefetch(ref)
        return None

    def abort(self, request_id: str) -> bool:
        """End it now, whatever its state, with no output. False when it is not here (any more)."""
        seq = self._sequences.get(request_id)
        if seq is None:
            return False
        self._end(seq)
        return True

    def fail(self, request_id: str, code: ErrorCode, message: str) -> TokenOutput | None:
        """End it now, whatever its state, with an error. None when it is not here (any more)."""
        seq = self._sequences.get(request_id)
        return None if seq is None else self._fail(seq, code, message)

    def _fail(self, seq: Sequence, code: ErrorCode, message: str) -> TokenOutput:
        self._end(seq)
        return refusal(seq, code, message)

    def _end(self, seq: Sequence) -> None:
        del self._sequences[seq.request_id]
        if seq.state is State.RUNNING:
            self._stop(seq)
        else:
            self._line.remove(seq)
            self._policy.gives_up(seq)
            self._prompts.stopped(seq)
            if seq.adapters and not self._line.waits_for(seq.digests):
                self._gate.cancel(seq.adapters)
        seq.state = State.FINISHED

    def preempt(self) -> bool:
        """Send a running sequence back to the line, the policy says which, to be recomputed later; nothing of
        it is lost. False when at most one runs. Raises RuntimeError while a step is in flight."""
        if self._flight:
            raise RuntimeError("a sequence in flight cannot be preempted: tokens of it are not known yet")
        if len(self._running) < 2:
            return False
        self._send_back(self._policy.victim(self._running))
        return True

    def _send_back(self, seq: Sequence) -> None:
        self._stop(seq)
        seq.num_computed = 0
        seq.num_preemptions += 1
        self.preemptions += 1
        self._wait(seq)

    def _wait(self, seq: Sequence) -> None:
        self._policy.waits(seq, self._clock())
        self._line.add(seq)

    def _start(self, seq: Sequence, now: float) -> None:
        self._line.remove(seq)
        seq.start(now)
        self._running.add(seq)
        self._prompts.started(seq)
        self._policy.starts(seq, now)

    def _stop(self, seq: Sequence) -> None:
        """A running sequence gives back what it holds; the caller sets its new state."""
        self._running.remove(seq)
        self._policy.stops(seq)
        if seq.adapters:
            self._gate.release(seq.adapters)
        self._pool.release(seq.block_ids)
        seq.block_ids = []
        self._prompts.stopped(seq)

    # -- when a step fails

    def make_way(self) -> list[TokenOutput]:
        """Memory ran out in a step. Those in flight are lost, and who ran in them is computed again. One of
        those that run, the policy says which, makes way for the others; where it did so before and has got no
        token since, it ends with an error. Alone, it is tried once more. Plan again without new ones."""
        seq = self._policy.victim(self._running) if self._running else None
        for each in self._running:
            each.logits_state.clear()  # perhaps of a token that nobody got
        self._lose_flight()
        if seq is None:
            return []
        if seq.was_too_large:
            return [self._fail(seq, ErrorCode.OUT_OF_MEMORY, TOO_LARGE)]
        seq.was_too_large = True
        if seq.state is State.RUNNING and len(self._running) > 1:
            self._send_back(seq)
        return []

    def _lose_flight(self) -> None:
        for seq in self._flight.lose():
            if seq.state is State.RUNNING:
                self._send_back(seq)
                seq.forget_unread()

    # -- planning

    def plan(self, admit: bool = True) -> StepPlan:
        """The next step, possibly of no runs. Blocks of every run are allocated, adapters acquired. With
        `admit` off nobody starts."""
        now = self._clock()
        failed = self._end_late(now)
        self._grow()
        if admit and self._line and (self._has_place or self._policy.may_hand_over):
            failed += self._admit(now)
        runs = self._running.runs(self._max_num_batched_tokens, self._policy.goes_first)
        return StepPlan(runs, failed, self._prompts.copies)

    @property
    def _has_place(self) -> bool:
        return len(self._running) < self._max_num_seqs

    def _end_late(self, now: float) -> list[TokenOutput]:
        ended = [self._sequences[request_id] for request_id in self._deadlines.passed(now)]
        return [self._fail(seq, ErrorCode.DEADLINE_EXCEEDED, late(seq)) for seq in ended]

    def _grow(self) -> None:
        """A block for each sequence that needs one more, oldest first; prompts kept for choices yet to
        start make way when there is none, then whoever the policy says. Each time somebody goes on, so
        there is no livelock."""
        for seq in self._running.take_growing():
            while seq.state is State.RUNNING and not self._pool.available:
                if not (self._prompts.make_room() or self.preempt()):
                    break
            if seq.state is State.RUNNING:
                seq.block_ids += self._pool.allocate(1)

    def _admit(self, now: float) -> list[TokenOutput]:
        """Start waiting sequences while there are places, tokens, blocks and adapters for them; prompts of
        others take no tokens from one that goes first.

        One that lacks adapters is passed over; one that lacks blocks holds up those behind it, because
        otherwise long prompts would starve. Returns the errors of those whose adapters cannot be had.
        """
        failed: list[TokenOutput] = []
        room = self._running.prompt_room(self._max_num_batched_tokens, self._policy.goes_first)
        if room.is_spent:
            return failed
        turns = AdapterTurns(self._gate, self._line, self._running.mixes, now)
        self._is_owed_a_place = False
        for seq in self._line.in_order(now, turns.passed_over):
            if not room.is_for(seq) or not (self._has_place or self._may_take_place(seq)):
                turns.end(first_not_tried=seq)
                break
            if self._prompts.must_wait(seq) or (answer := turns.take(seq)) is None:
                continue
            if answer.status is AcquireStatus.FAILED:
                code = answer.error or ErrorCode.ADAPTER_LOAD_FAILED
                failed.append(self._fail(seq, code, answer.message))
                continue
            if not self._take_room(seq):
                turns.give_back(seq)
                turns.end(first_not_tried=seq)
                break
            self._start(seq, now)
            turns.started(seq)
            room.take(seq)
        else:
            turns.end(first_not_tried=None)
        return failed

    def _may_take_place(self, seq: Sequence) -> bool:
        """Whether somebody who runs is to make way for it now."""
        owed = self._policy.may_hand_over and self._policy.owed_by(seq, self._running) is not None
        if owed and self._flight:
            self._is_owed_a_place = True
        return owed and not self._flight

    def _take_room(self, seq: Sequence) -> bool:
        """A place and blocks, from those who owe them where there are none."""
        while not (self._has_place and self._blocks.take(seq, len(self._running))):
            if not self._may_take_place(seq):
                return False
            other = self._policy.owed_by(seq, self._running)
            assert other is not None
            self._send_back(other)
        return True

    # -- after the step

    def launched(self, plan: StepPlan) -> None:
        """The device has the step, and will do it before all that it is given later: plan on from there.

        Each run that samples gets a place for its token, which `update` brings. Only for plans whose runs
        have one row at most. Updates come in the order of launches.
        """
        if plan.copies:
            for run in plan.runs:
                self._prompts.copied(run.seq)
        for run in self._flight.launch(plan):
            seq = run.seq
            if run.start < seq.num_prompt_tokens:
                end = min(run.start + run.num_tokens, seq.num_prompt_tokens)
                self.prompt_tokens += end - run.start
            self._running.advance(run)
            if seq.group is not None and seq.num_computed >= seq.num_prompt_tokens:
                self._prompts.computed(seq)

    def update(
        self,
        plan: StepPlan,
        token_ids: abc.Sequence[abc.Sequence[int]],
        logprobs: abc.Sequence[abc.Sequence[Logprobs]] | None = None,
        prompt_logprobs: abc.Sequence[list[Logprobs]] | None = None,
    ) -> list[TokenOutput]:
        """Take in what a step computed: for each run, in plan order, the tokens that it gave its sequence,
        and their and the prompt's log-probabilities where any were asked for. What belongs to sequences ended
        since the plan is ignored. Raises ValueError when there are not as many lists as runs."""
        if len(token_ids) != len(plan.runs):
            raise ValueError(f"{len(token_ids)} tokens for {len(plan.runs)} runs")
        if not self._flight:
            self.launched(plan)
        counts = self._flight.land(plan)
        outputs: list[TokenOutput] = []
        for at, run in enumerate(plan.runs):
            if counts[at]:
                self._blocks.offer(run)
                if prompt_logprobs and prompt_logprobs[at]:
                    outputs += run.seq.scored(prompt_logprobs[at])
                if token_ids[at]:
                    outputs.append(self._sampled(run, token_ids[at], logprobs[at] if logprobs else ()))
                elif run.seq.is_prompt_alone and run.start + run.num_tokens == run.seq.num_tokens:
                    self._end(run.seq)
                    outputs.append(run.seq.output([], "length", [], first=True))
        return outputs

    def _sampled(
        self, run: ScheduledRun, tokens: abc.Iterable[int], logprobs: abc.Sequence[Logprobs]
    ) -> TokenOutput:
        """Give its sequence the tokens, up to one that ends it."""
        seq, reason, taken = run.seq, None, []
        first = seq.num_generated == seq.num_unread
        for token in tokens:
            reason = seq.take(token)
            taken.append(token)
            if reason is not None:
                break
        self.generated_tokens += len(taken)
        self._policy.generated(seq, len(taken))
        seq.was_too_large = False
        if reason is not None:
            self._end(seq)
        elif run.rows > 1:
            self._running.moved_on(seq)
        return seq.output(taken, reason, list(logprobs[: len(taken)]), first=first)
