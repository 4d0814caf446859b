"""What runs in the next step.

Continuous batching (Yu et al. 2022, Orca) under a token budget with chunked prefill (Agrawal et al. 2024,
Sarathi-Serve) over paged KV blocks, with arena room for adapters as a third thing that an admitted sequence
must have. Holds no tensor and starts no thread: a step is `plan`, the runner's work, `update`.
"""

from __future__ import annotations

import time
from collections import abc
from itertools import chain

from server.messages import ErrorCode, Logprobs, TokenOutput
from server.scheduling.adapter_gate import AcquireStatus, AdapterGate
from server.scheduling.adapter_turns import AdapterTurns
from server.scheduling.block_pool import BlockPool, extend_hashes
from server.scheduling.policy import FirstComeFirstServed, Policy
from server.scheduling.prompt_group import SharedPrompts
from server.scheduling.sequence import MixKey, Sequence, State
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
        self._running: dict[Sequence, None] = {}  # in order of admission
        self._mixes: dict[MixKey, list[Sequence]] = {}  # the running ones that use adapters
        self._base: list[Sequence] = []  # the running ones that use none
        self._prefilling: list[Sequence] = []  # the running ones with more than one token to compute
        self._growing: list[Sequence] = []  # their next token starts a block that they do not have yet
        self._prompts = SharedPrompts(pool)

        self.preemptions = 0
        self.prompt_tokens = 0  # computed so far; prefix hits not counted
        self.cached_prompt_tokens = 0  # taken from the prefix cache so far
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

    def fail(self, request_id: str, code: ErrorCode, message: str) -> TokenOutput:
        """End it now, whatever its state, with an error. Raises KeyError when it is not here (any more)."""
        seq = self._sequences[request_id]
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
        lost. False when at most one runs."""
        if len(self._running) < 2:
            return False
        seq = max(self._running, key=lambda candidate: candidate.order)
        self._stop(seq)
        seq.num_computed = 0
        seq.num_preemptions += 1
        self.preemptions += 1
        self._line.add(seq)
        return True

    def _start(self, seq: Sequence) -> None:
        self._line.remove(seq)
        seq.state = State.RUNNING
        self._running[seq] = None
        (self._mixes.setdefault(seq.mix_key, []) if seq.mix_key else self._base).append(seq)
        if seq.num_tokens - seq.num_computed > 1:
            self._prefilling.append(seq)
        self._prompts.started(seq)

    def _stop(self, seq: Sequence) -> None:
        """A running sequence gives back what it holds; the caller sets its new state."""
        del self._running[seq]
        if seq.mix_key:
            self._mixes[seq.mix_key].remove(seq)
            if not self._mixes[seq.mix_key]:
                del self._mixes[seq.mix_key]
            self._gate.release(seq.adapters)
        else:
            self._base.remove(seq)
        if seq in self._prefilling:
            self._prefilling.remove(seq)
        self._pool.release(seq.block_ids)
        seq.block_ids = []
        self._prompts.stopped(seq)

    # -- planning

    def plan(self) -> StepPlan:
        """The next step, possibly of no runs. Blocks of every run are allocated, adapters acquired."""
        self._grow()
        tokens = self._max_num_batched_tokens - (len(self._running) - len(self._prefilling))
        failed: list[TokenOutput] = []
        if self._line and len(self._running) < self._max_num_seqs:
            tokens_to_prefill = sum(seq.num_tokens - seq.num_computed for seq in self._prefilling)
            if tokens > tokens_to_prefill:
                failed = self._admit(tokens - tokens_to_prefill)
                tokens = self._max_num_batched_tokens - (len(self._running) - len(self._prefilling))
        return StepPlan(self._runs(self._chunks(tokens)), failed, self._prompts.copies)

    def _grow(self) -> None:
        """A block for each sequence that needs one more, oldest first; prompts kept for choices yet to
        start make way when there is none, then the youngest. The oldest always goes on, so there is no
        livelock."""
        growing, self._growing = self._growing, []
        if len(growing) > self._pool.available:
            growing.sort(key=lambda seq: seq.order)
        for seq in growing:
            while seq.state is State.RUNNING and not self._pool.available:
                if not (self._prompts.make_room() or self.preempt_youngest()):
                    break
            if seq.state is State.RUNNING:
                seq.block_ids += self._pool.allocate(1)

    def _chunks(self, tokens: int) -> dict[Sequence, int]:
        """Shares `tokens` out among the prefilling sequences, first admitted first."""
        chunks = {}
        for seq in self._prefilling:
            chunks[seq] = min(seq.num_tokens - seq.num_computed, tokens)
            tokens -= chunks[seq]
            if not tokens:
                break
        return chunks

    def _runs(self, chunks: dict[Sequence, int]) -> list[ScheduledRun]:
        runs: list[ScheduledRun] = []
        for seq in chain(*self._mixes.values(), self._base):
            start = seq.num_computed
            known = seq.num_tokens - start
            if known == 1:
                runs.append(ScheduledRun(seq, seq.mix_key, start, 1, rows=1))
            elif seq in chunks:
                ends = chunks[seq] == known
                runs.append(ScheduledRun(seq, seq.mix_key, start, chunks[seq], rows=int(ends)))
        return runs

    def _admit(self, tokens: int) -> list[TokenOutput]:
        """Start waiting sequences while there are places, tokens, blocks and adapters for them.

        One that lacks adapters is passed over; one that lacks blocks holds up those behind it, because
        otherwise long prompts would starve. Returns the errors of those whose adapters cannot be had.
        """
        failed: list[TokenOutput] = []
        now = self._clock()
        turns = AdapterTurns(self._gate, self._line, self._mixes.values(), now)
        for seq in self._line.in_order(self._policy, now, turns.passed_over):
            if tokens <= 0 or len(self._running) == self._max_num_seqs:
                turns.end(first_not_tried=seq)
                break
            if self._prompts.must_wait(seq) or (answer := turns.take(seq)) is None:
                continue
            if answer.status is AcquireStatus.FAILED:
                code = answer.error or ErrorCode.ADAPTER_LOAD_FAILED
                failed.append(self.fail(seq.request_id, code, answer.message))
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
        outputs: list[TokenOutput] = []
        for at, run in enumerate(plan.runs):
            seq = run.seq
            if plan.copies:
                self._prompts.copied(seq)
            if seq.state is not State.RUNNING or seq.num_computed != run.start:
                continue
            self._computed(seq, run.num_tokens)
            if token_ids[at]:
                outputs.append(self._sampled(seq, token_ids[at], logprobs[at] if logprobs else ()))
        return outputs

    def _computed(self, seq: Sequence, num_tokens: int) -> None:
        """K and V of the next `num_tokens` are in the cache: offer the blocks they filled for reuse."""
        start = seq.num_computed
        seq.num_computed = end = start + num_tokens
        if start < seq.num_prompt_tokens:
            self.prompt_tokens += min(end, seq.num_prompt_tokens) - start
        if seq.num_tokens - start > 1 and seq.num_tokens - end <= 1:
            self._prefilling.remove(seq)
        if seq.group is not None and end >= seq.num_prompt_tokens:
            self._prompts.computed(seq)
        block_size = self._pool.block_size
        if self._pool.prefix_caching and end // block_size > start // block_size:
            extend_hashes(seq.block_hashes, seq.tokens[:end], seq.mix_key, block_size)
            for i in range(start // block_size, end // block_size):
                self._pool.register(seq.block_ids[i], seq.block_hashes[i])

    def _sampled(
        self, seq: Sequence, tokens: abc.Iterable[int], logprobs: abc.Sequence[Logprobs]
    ) -> TokenOutput:
        """Append the tokens, up to one that ends it."""
        first, reason, taken = seq.num_generated == 0, None, []
        for token in tokens:
            seq.append(token)
            taken.append(token)
            reason = seq.finish_reason()
            if reason is not None:
                break
        self.generated_tokens += len(taken)
        if reason is not None:
            self._end(seq)
        elif seq.num_computed == len(seq.block_ids) * self._pool.block_size:
            self._growing.append(seq)
        return TokenOutput(
            seq.request_id,
            taken,
            finish_reason=reason,
            stop_token=taken[-1] if reason == "stop" else None,
            cached_tokens=seq.cached_tokens if first else 0,
            logprobs=list(logprobs[: len(taken)]) or None,
        )


def _error(seq: Sequence, code: ErrorCode, message: str) -> TokenOutput:
    return TokenOutput(seq.request_id, [], finish_reason="error", error=code, message=message)
