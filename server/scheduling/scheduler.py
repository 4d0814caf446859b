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
from server.scheduling.block_pool import BlockPool, extend_hashes
from server.scheduling.policy import FirstComeFirstServed, Policy
from server.scheduling.prompt_group import SharedPrompts
from server.scheduling.running import Running
from server.scheduling.sequence import Sequence, State
from server.scheduling.step_plan import ScheduledRun, StepPlan
from server.scheduling.waiting_line import WaitingLine


class Scheduler:
    """Decides what runs, and keeps count of blocks and adapter references for it.

    Every added sequence gets exactly one terminal TokenOutput (from `add`, `plan`, `update` or `fail`),
    except one that is aborted, which gets none. A plan that is never updated, because its step failed, is
    simply planned again.

    max_num_batched_tokens: tokens of one step. At most that many sequences run, so that each gets one.
    patience_s: how long a sequence may be passed over for want of arena room before others wait for it.
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
        self._line = WaitingLine(patience_s)
        self._running = Running(pool.block_size)
        self._prompts = SharedPrompts(pool)
        self._in_flight: list[tuple[StepPlan, list[bool]]] = []  # oldest first, with the runs that count

        self.preemptions = 0
        self.prompt_tokens = 0  # computed so far; prefix hits not counted
        self.prefix_query_tokens = 0  # looked up in the prefix cache so far
        self.cached_prompt_tokens = 0  # taken from it
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
    def request_ids(self) -> list[str]:
        """Of every sequence that has not ended."""
        return list(self._sequences)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def runnable(self) -> bool:
        """Whether `plan` may have something to run. If not, all there is waits for adapters: plan again
        when a copy has landed, or after a moment."""
        return bool(self._running) or len(self._line) > self._line.for_adapter

    @property
    def can_plan_ahead(self) -> bool:
        """Whether the next plan needs no token of those in flight: nobody would have to make room."""
        return self._running.growing <= self._pool.available

    # -- coming and going

    def add(self, seq: Sequence) -> TokenOutput | None:
        """Put in line and start bringing its adapters near. Returns its terminal output if it can never
        run here, else None. Raises ValueError when its request id is in use."""
        if seq.request_id in self._sequences:
            raise ValueError(f"request {seq.request_id} is already here")
        seq.limit(self._eos_token_ids, self._max_model_len)
        if problem := self._never_fits(seq):
            seq.state = State.FINISHED
            return _error(seq, ErrorCode.NEVER_FITS, problem)
        self._sequences[seq.request_id] = seq
        self._line.add(seq)
        for ref in seq.adapters:
            self._gate.prefetch(ref)
        return None

    def _never_fits(self, seq: Sequence) -> str:
        if seq.num_prompt_tokens == 0:
            return "The prompt has no tokens."
        if seq.num_prompt_tokens >= self._max_model_len:
            return (
                f"The prompt has {seq.num_prompt_tokens} tokens; with one to generate that is more than the "
                f"{self._max_model_len} that this server allows."
            )
        # The last token is given out, never computed.
        if self._pool.blocks_for(seq.max_length - 1) > self._pool.num_blocks:
            return (
                f"Prompt and output of {seq.max_length} tokens can never fit into the KV cache of "
                f"{self._pool.num_blocks * self._pool.block_size} tokens."
            )
        return ""

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
        return _error(seq, code, message)

    def _end(self, seq: Sequence) -> None:
        del self._sequences[seq.request_id]
        if seq.state is State.RUNNING:
            self._stop(seq)
        else:
            self._line.remove(seq)
            self._prompts.stopped(seq)
            if seq.adapters and not self._line.waits_for(seq.digests):
                self._gate.cancel(seq.adapters)
        seq.state = State.FINISHED

    def preempt_youngest(self) -> bool:
        """Send the youngest running sequence back to the line, to be recomputed later; nothing of it is
        lost. False when at most one runs. Raises RuntimeError while a step is in flight."""
        if self._in_flight:
            raise RuntimeError("a sequence in flight cannot be preempted: tokens of it are not known yet")
        if len(self._running) < 2:
            return False
        seq = self._running.youngest
        self._stop(seq)
        seq.num_computed = 0
        seq.num_preemptions += 1
        self.preemptions += 1
        self._line.add(seq)
        return True

    def _start(self, seq: Sequence) -> None:
        self._line.remove(seq)
        if seq.started_at is None:
            seq.started_at = self._clock()
            seq.waited_for_adapter = seq.state is State.WAITING_FOR_ADAPTER
        seq.state = State.RUNNING
        self._running.add(seq)
        self._prompts.started(seq)

    def _stop(self, seq: Sequence) -> None:
        """A running sequence gives back what it holds; the caller sets its new state."""
        self._running.remove(seq)
        if seq.adapters:
            self._gate.release(seq.adapters)
        self._pool.release(seq.block_ids)
        seq.block_ids = []
        self._prompts.stopped(seq)

    # -- planning

    def plan(self) -> StepPlan:
        """The next step, possibly of no runs. Blocks of every run are allocated, adapters acquired."""
        self._grow()
        failed: list[TokenOutput] = []
        if self._line and len(self._running) < self._max_num_seqs:
            tokens = self._max_num_batched_tokens - self._running.decoding - self._running.tokens_to_prefill
            if tokens > 0:
                failed = self._admit(tokens)
        tokens = self._max_num_batched_tokens - self._running.decoding
        return StepPlan(self._running.runs(tokens), failed, self._prompts.copies)

    def _grow(self) -> None:
        """A block for each sequence that needs one more, oldest first; prompts kept for choices yet to
        start make way when there is none, then the youngest. The oldest always goes on, so there is no
        livelock."""
        for seq in self._running.take_growing():
            while seq.state is State.RUNNING and not self._pool.available:
                if not (self._prompts.make_room() or self.preempt_youngest()):
                    break
            if seq.state is State.RUNNING:
                seq.block_ids += self._pool.allocate(1)

    def _admit(self, tokens: int) -> list[TokenOutput]:
        """Start waiting sequences while there are places, tokens, blocks and adapters for them.

        One that lacks adapters is passed over; one that lacks blocks holds up those behind it, because
        otherwise long prompts would starve. Returns the errors of those whose adapters cannot be had.
        """
        failed: list[TokenOutput] = []
        now = self._clock()
        turns = AdapterTurns(self._gate, self._line, self._running.mixes, now)
        for seq in self._line.in_order(self._policy, now, turns.passed_over):
            if tokens <= 0 or len(self._running) == self._max_num_seqs:
                turns.end(first_not_tried=seq)
                break
            if self._prompts.must_wait(seq) or (answer := turns.take(seq)) is None:
                continue
            if answer.status is AcquireStatus.FAILED:
                code = answer.error or ErrorCode.ADAPTER_LOAD_FAILED
                failed.append(self._fail(seq, code, answer.message))
                continue
            if not self._take_blocks(seq):
                turns.give_back(seq)
                turns.end(first_not_tried=seq)
                break
            self._start(seq)
            turns.started(seq)
            tokens -= seq.num_tokens - seq.num_computed
        else:
            turns.end(first_not_tried=None)
        return failed

    def _take_blocks(self, seq: Sequence) -> bool:
        """Cached blocks of its prefix and new ones for all other known tokens; all or nothing.

        Room for the whole prompt and not for its next chunk alone, so that two long prompts never preempt
        one another half-way; and one block more for each running sequence, which will soon want it.
        """
        while not self._try_blocks(seq):
            # Kept prompts make way; the one that it would share only where nobody runs who would make room.
            if not self._prompts.make_room(but_for=seq if self._running else None):
                return False
        return True

    def _try_blocks(self, seq: Sequence) -> bool:
        pool = self._pool
        # The last token is always computed: its logits give the next one.
        most = (seq.num_tokens - 1) // pool.block_size
        prompt = self._prompts.prompt_of(seq)
        if prompt:
            hits = prompt[:most]
            pool.share(hits)
        else:
            hits = self._cached_blocks(seq, most)
        wanted = pool.blocks_for(seq.num_tokens) - len(hits)
        if wanted + len(self._running) > pool.available:
            pool.release(hits)
            return False
        seq.block_ids = hits + pool.allocate(wanted)
        seq.num_computed = len(hits) * pool.block_size
        if prompt:
            self._prompts.copy(seq, prompt[most], seq.block_ids[most])
            seq.num_computed = seq.num_tokens - 1
        elif not seq.num_preemptions:
            self.prefix_query_tokens += seq.num_prompt_tokens if pool.prefix_caching else 0
            seq.cached_tokens = seq.num_computed
            self.cached_prompt_tokens += seq.num_computed
        return True

    def _cached_blocks(self, seq: Sequence, most: int) -> list[int]:
        """Blocks of its prefix that the cache knows, with a reference to each."""
        if not self._pool.prefix_caching:
            return []
        extend_hashes(seq.block_hashes, seq.tokens, seq.mix_key, self._pool.block_size)
        return self._pool.match_prefix(seq.block_hashes[:most])

    # -- after the step

    def launched(self, plan: StepPlan) -> None:
        """The device has the step, and will do it before all that it is given later: plan on from there.

        Each run that samples gets a place for its token, which `update` brings. Only for plans whose runs
        have one row at most. Updates come in the order of launches.
        """
        counts = [run.seq.state is State.RUNNING and run.seq.num_computed == run.start for run in plan.runs]
        for run, counted in zip(plan.runs, counts, strict=True):
            seq = run.seq
            if plan.copies:
                self._prompts.copied(seq)
            if not counted:
                continue
            if run.start < seq.num_prompt_tokens:
                end = min(run.start + run.num_tokens, seq.num_prompt_tokens)
                self.prompt_tokens += end - run.start
            self._running.advance(run)
            if seq.group is not None and seq.num_computed >= seq.num_prompt_tokens:
                self._prompts.computed(seq)
        self._in_flight.append((plan, counts))

    def update(
        self,
        plan: StepPlan,
        token_ids: abc.Sequence[abc.Sequence[int]],
        logprobs: abc.Sequence[abc.Sequence[Logprobs]] | None = None,
    ) -> list[TokenOutput]:
        """Take in what a step computed: for each run, in plan order, the tokens that it gave its sequence
        (none where a prompt goes on), and their log-probabilities where any were asked for. What belongs
        to sequences ended since the plan is ignored. Returns one output for each sequence that got tokens.
        Raises ValueError when there are not as many lists as runs."""
        if len(token_ids) != len(plan.runs):
            raise ValueError(f"{len(token_ids)} tokens for {len(plan.runs)} runs")
        if not self._in_flight:
            self.launched(plan)
        launched, counts = self._in_flight.pop(0)
        if launched is not plan:
            raise ValueError("steps are updated in the order in which they were launched")
        outputs: list[TokenOutput] = []
        for at, run in enumerate(plan.runs):
            if counts[at] and run.seq.state is State.RUNNING:
                self._offer_blocks(run)
                if token_ids[at]:
                    outputs.append(self._sampled(run, token_ids[at], logprobs[at] if logprobs else ()))
        return outputs

    def _offer_blocks(self, run: ScheduledRun) -> None:
        """Those that the run filled, for reuse: their tokens are known now."""
        seq, block_size, end = run.seq, self._pool.block_size, run.start + run.num_tokens
        if self._pool.prefix_caching and end // block_size > run.start // block_size:
            extend_hashes(seq.block_hashes, seq.tokens[:end], seq.mix_key, block_size)
            for i in range(run.start // block_size, end // block_size):
                self._pool.register(seq.block_ids[i], seq.block_hashes[i])

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
        if reason is not None:
            self._end(seq)
        elif run.rows > 1:
            self._running.moved_on(seq)
        return TokenOutput(
            seq.request_id,
            taken,
            finish_reason=reason,
            stop_token=taken[-1] if reason == "stop" else None,
            cached_tokens=seq.cached_tokens if first else 0,
            logprobs=list(logprobs[: len(taken)]) or None,
            started_at=seq.started_at if first else None,
            waited_for_adapter=seq.waited_for_adapter if first else False,
        )


def _error(seq: Sequence, code: ErrorCode, message: str) -> TokenOutput:
    return TokenOutput(seq.request_id, [], finish_reason="error", error=code, message=message)
