"""The engine: takes requests, plans a step, runs it, says what came out.

A plain class with `add`, `abort` and `step`; `worker.py` drives it behind a socket, tests drive it directly.
It is the only place that sees both the scheduler and the runner.
"""

from __future__ import annotations

import logging
import math
import os
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch

from server.config import Settings
from server.devices import open_device, read_device
from server.engine.guides import Guides, open_vocabulary
from server.engine.wakeup import Wakeup
from server.lora.arena import Arena
from server.lora.residency import Residency
from server.messages import (
    STEP_TOKEN_BOUNDS,
    AdapterResult,
    EngineInfo,
    EngineStats,
    ErrorCode,
    LoadAdapter,
    Request,
    TokenOutput,
    UnloadAdapter,
)
from server.model.batch import BatchBuilder
from server.model.device import Device, Operators, is_out_of_memory
from server.model.loader import LoadedModel, load, read_classes, threads_for
from server.model.logits import grammar_error, nothing_left
from server.model.memory import MemorySizes, memory_sizes, rank_limit, scored_tokens, token_budget
from server.model.runner import Pending, Runner
from server.model.sampling import SampleRow
from server.scheduling.adapter_gate import AcquireStatus
from server.scheduling.block_pool import BlockPool
from server.scheduling.policy import new_policy
from server.scheduling.prompt_group import sequences_of
from server.scheduling.refusals import refusal
from server.scheduling.scheduler import Scheduler
from server.scheduling.sequence import Sequence
from server.scheduling.step_plan import StepPlan

log = logging.getLogger(__name__)

_NON_FINITE = "The model's output overflowed: the adapter's weights do not suit this prompt."
# How soon to look again, at the latest, when all that waits, waits for an adapter. One that lands wakes the
# worker; but the patience of those who want room runs out by the clock.
_LOOK_AGAIN_MS = 1000


class Engine:
    """One base model on one device, its adapters and its sequences. One thread calls it.

    `operators` are the device's own for the model when None.
    """

    def __init__(
        self,
        settings: Settings,
        loaded: LoadedModel,
        memory: MemorySizes,
        device: Device,
        operators: Operators | None = None,
    ) -> None:
        with threads_for(loaded.parameters):
            operators = operators or device.operators(loaded, settings.attention)
            self._runner = Runner(
                loaded, operators, num_blocks=memory.kv_blocks, block_size=settings.block_size
            )
        self._arena = Arena(
            memory.arena_bytes,
            len(self._runner.targets),
            loaded.dtype,
            loaded.device,
            slots=device.arena_slots,
        )
        if not settings.enforce_eager:
            self._runner.capture(
                self._arena.view(),
                partial(device.graphs, settings=settings, max_model_len=loaded.max_model_len),
                max_num_seqs=settings.max_num_seqs,
            )
        tokens = token_budget(settings, device)
        self._max_rank = rank_limit(settings, self._runner.targets, self._runner.max_mix_rank(tokens))
        self._wakeup = Wakeup()
        self._residency = Residency(
            self._arena,
            self._runner.targets,
            memory.host_cache_bytes,
            replace(settings.limits, max_rank=self._max_rank),
            pinned_share=settings.max_pinned_share,
            copies=device.copies,
            wake=self._wakeup.set,
        )
        self._guides = Guides(partial(open_vocabulary, settings, loaded), self._wakeup.set)
        self._eos_token_ids = loaded.eos_token_ids
        self._batches = BatchBuilder(self._residency.slot, settings.block_size, loaded.eos_token_ids)
        self._pool = BlockPool(memory.kv_blocks, settings.block_size, settings.prefix_caching)
        self._scheduler = Scheduler(
            self._pool,
            self._residency,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=tokens,
            max_model_len=loaded.max_model_len,
            max_scored_tokens=scored_tokens(loaded.vocab_size),
            eos_token_ids=loaded.eos_token_ids,
            policy=new_policy(settings.scheduling_policy, tokens),
        )
        self._runs_beside_host = device.runs_beside_host
        self._in_flight: deque[tuple[StepPlan, Pending]] = deque()  # launched and not read, oldest first
        self._arrivals = self._steps = self._step_tokens_sum = 0
        self._step_tokens = [0] * (len(STEP_TOKEN_BOUNDS) + 1)
        self._refused: list[TokenOutput] = []
        self._calls: list[LoadAdapter | UnloadAdapter] = []  # adapter calls without an answer yet
        self._settled = True  # another step would change nothing until an adapter lands
        self.info = self._info(settings, loaded, memory)

    # -- what the worker calls

    def add(self, request: Request) -> None:
        """Put a request, with its forks, in line. What can never run here, the next step says so."""
        sequences = sequences_of(request, time.monotonic(), self._arrivals)
        self._arrivals += len(sequences)
        grammar = request.sampling.grammar
        if grammar is None or self._guides.guide(grammar, sequences):
            for seq in sequences:
                self._line_up(seq)

    def _line_up(self, seq: Sequence) -> None:
        refused = self._scheduler.add(seq)
        if refused is not None:
            self._refused.append(refused)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End these now, with no output; ids that are not here (any more) are passed over."""
        for request_id in request_ids:
            self._guides.cancel(request_id)
            self._scheduler.abort(request_id)
        self._settled = False

    def load_adapter(self, call: LoadAdapter) -> None:
        """Bring an adapter into the arena; a later step answers."""
        self._calls.append(call)
        self._settled = False

    def unload_adapter(self, call: UnloadAdapter) -> None:
        """Take an adapter out of the arena, now or at its last use; the next step says where it is."""
        self._residency.unload(call.digest, call.forget)
        self._calls.append(call)
        self._settled = False

    def step(self) -> tuple[list[TokenOutput], list[AdapterResult]]:
        """Plan and launch one step. Returns the new tokens, which are the last step's where the device works
        beside the host, and the answers to adapter calls.
        """
        self._wakeup.clear()
        landed = self._residency.poll()
        self._take_guided()
        results = self._answer_calls()
        outputs, self._refused = self._refused, []
        ran = self._run(outputs)
        self._settled = not (landed or results or outputs or ran)
        return outputs, results

    def _take_guided(self) -> None:
        """Put those whose grammars are compiled in line."""
        for seq, problem in self._guides.poll():
            if problem is None:
                self._line_up(seq)
            else:
                self._refused.append(refusal(seq, ErrorCode.GRAMMAR, problem))

    def idle_ms(self) -> int | None:
        """0: call `step` now; n: adapters are on their way, call it when one landed (`wait`) or after n ms;
        None: nothing to do."""
        if self._refused or self._in_flight or self._scheduler.runnable:
            return 0
        if not (self._calls or self._guides or self._residency.pending or self._scheduler.has_work):
            return None
        if not self._settled:
            return 0
        deadline = self._scheduler.next_deadline
        left_ms = math.inf if deadline is None else 1000 * (deadline - time.monotonic())
        return max(0, math.ceil(min(_LOOK_AGAIN_MS, left_ms)))

    @property
    def wakeup_fd(self) -> int:
        """Readable from the moment an adapter landed, or could not, to the next step."""
        return self._wakeup.fileno()

    def wait(self, timeout_s: float) -> bool:
        """Sleep until an adapter landed, or could not; False when none did within `timeout_s`."""
        return self._wakeup.wait(timeout_s)

    def stats(self) -> EngineStats:
        """What the engine holds now."""
        scheduler, residency = self._scheduler, self._residency
        return EngineStats(
            steps=self._steps,
            running=scheduler.running,
            waiting=scheduler.waiting + len(self._guides),
            waiting_for_adapter=scheduler.waiting_for_adapter,
            kv_blocks_total=self._pool.num_blocks,
            kv_blocks_free=self._pool.free,
            kv_blocks_cached=self._pool.cached,
            arena_bytes_total=self._arena.bytes_total,
            arena_bytes_used=self._arena.bytes_used,
            host_bytes_used=residency.host_bytes_used,
            resident=residency.resident,
            on_host=residency.on_host,
            preemptions=scheduler.preemptions,
            adapter_loads=residency.loads,
            adapter_evictions=residency.evictions,
            prompt_tokens=scheduler.prompt_tokens,
            cached_prompt_tokens=scheduler.cached_prompt_tokens,
            generated_tokens=scheduler.generated_tokens,
            waiting_digests=scheduler.waiting_digests,
            running_digests=scheduler.running_digests,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            step_tokens=tuple(self._step_tokens),
            step_tokens_sum=self._step_tokens_sum,
        )

    @property
    def fast_paths(self) -> dict[str, bool]:
        """Which of the paths that replace transformers' own code are in use: fused, flat, graphs."""
        return self._runner.fast_paths

    def close(self) -> None:
        """Stop the threads that load adapters and compile grammars."""
        self._guides.close()
        self._residency.close()
        self._wakeup.close()

    def _info(self, settings: Settings, loaded: LoadedModel, memory: MemorySizes) -> EngineInfo:
        return EngineInfo(
            pid=os.getpid(),
            model_type=loaded.model_type,
            device=str(loaded.device),
            dtype=str(loaded.dtype).removeprefix("torch."),
            vocab_size=loaded.vocab_size,
            max_model_len=loaded.max_model_len,
            parameters=loaded.parameters,
            weights_bytes=loaded.weights_bytes,
            block_size=settings.block_size,
            kv_blocks=memory.kv_blocks,
            kv_bytes=memory.kv_bytes,
            arena_bytes=self._arena.bytes_total,
            lora_targets=self._runner.targets,
            max_mix_rank=self._max_rank,
            load_seconds=loaded.load_seconds,
        )

    # -- one step

    def _run(self, outputs: list[TokenOutput]) -> bool:
        """One step, with what came of it put into `outputs`. Where memory runs out, one sequence makes way
        and the others are tried again, until it does not. Returns whether anybody ran."""
        admit = True
        while True:
            try:
                return self._try_to_run(outputs, admit)
            except Exception as error:
                if not is_out_of_memory(error) or not (self._in_flight or self._scheduler.running):
                    raise
                log.warning("memory ran out in a step with %d sequences", self._scheduler.running)
            self._make_way(outputs)
            admit = False

    def _try_to_run(self, outputs: list[TokenOutput], admit: bool) -> bool:
        if not self._scheduler.can_plan_ahead:
            self._read(outputs, but=0)
        plan = self._scheduler.plan(admit)
        outputs += plan.failed
        may_wait = self._launch(plan) if plan.runs else False
        self._read(outputs, but=1 if may_wait else 0)
        return bool(plan.runs)

    def _make_way(self, outputs: list[TokenOutput]) -> None:
        """After a step that failed. Those launched before it are read, as far as that can be done."""
        try:
            self._read(outputs, but=0)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._in_flight.clear()
        outputs += self._scheduler.make_way()

    def _launch(self, plan: StepPlan) -> bool:
        """Give the device the step. Returns whether the next may be launched before this one is read."""
        unread = self._in_flight[-1][1].token_ids if self._in_flight else None
        batch = self._batches.build(plan.runs, plan.copies, unread)
        self._in_flight.append((plan, self._runner.launch(batch, self._arena.view())))
        self._count_step(sum(run.num_tokens for run in plan.runs))
        if not self._runs_beside_host or batch.sampling.must_be_read:
            return False
        if max(batch.rows) > 1 or batch.scored is not None:
            return False
        self._scheduler.launched(plan)
        return True

    def _count_step(self, tokens: int) -> None:
        self._steps += 1
        self._step_tokens[bisect_left(STEP_TOKEN_BOUNDS, tokens)] += 1
        self._step_tokens_sum += tokens

    def _read(self, outputs: list[TokenOutput], but: int) -> None:
        """What the steps in flight gave, all but the newest `but`; waits for them. Those behind one that
        cannot be read are lost with it."""
        while len(self._in_flight) > but:
            plan, pending = self._in_flight[0]
            try:
                results = pending.collect()
            except Exception:
                self._in_flight.clear()
                raise
            self._in_flight.popleft()
            # Ended before `update`, so that none of their blocks is offered for reuse.
            failed = (self._fail_broken(plan.runs[run].seq) for run in results.broken)
            outputs += (output for output in failed if output is not None)
            outputs += self._scheduler.update(
                plan, results.token_ids, results.logprobs, results.prompt_logprobs
            )

    def _fail_broken(self, seq: Sequence) -> TokenOutput | None:
        code, reason = ErrorCode.NON_FINITE, _NON_FINITE
        if problem := grammar_error(seq.logits_state):
            code, reason = ErrorCode.GRAMMAR, problem
        elif fields := nothing_left(SampleRow.of_next_read(seq, self._eos_token_ids), self.info.vocab_size):
            code, reason = ErrorCode.NO_TOKEN_LEFT, fields
        return self._scheduler.fail(seq.request_id, code, reason)

    def _answer_calls(self) -> list[AdapterResult]:
        """Answers to those adapter calls that have come to an end; the others are asked again next step."""
        answers = [(call, self._answer(call)) for call in self._calls]
        self._calls = [call for call, answer in answers if answer is None]
        return [answer for _, answer in answers if answer is not None]

    def _answer(self, call: LoadAdapter | UnloadAdapter) -> AdapterResult | None:
        if isinstance(call, UnloadAdapter):
            # "arena" when it is still in use: it leaves at its last use, and the caller may ask again.
            return AdapterResult(call.call_id, self._residency.where(call.digest))
        digest = call.adapter.digest
        answer = self._residency.load(call.adapter, call.pin)
        match answer.status:
            case AcquireStatus.PENDING:
                return None
            case AcquireStatus.READY:
                return AdapterResult(call.call_id, "arena", self._residency.load_ms(digest))
            case AcquireStatus.FULL:
                error, message = ErrorCode.OUT_OF_MEMORY, "every adapter in the arena is in use or pinned"
            case AcquireStatus.FAILED:
                error, message = answer.error or ErrorCode.ADAPTER_LOAD_FAILED, answer.message
        return AdapterResult(call.call_id, self._residency.where(digest), error=error, message=message)


def prepare(settings: Settings) -> None:
    """What `create_engine` does that needs no device and starts no thread, so that copies of this process
    have it done. Raises what that raises."""
    read_classes(settings)
    read_device(settings.device)


def create_engine(settings: Settings) -> Engine:
    """Load the base model and build an engine around it.

    Raises UnsupportedModel when the model would be served wrongly, ValueError when memory is too small.
    """
    torch.set_num_threads(settings.threads or len(os.sched_getaffinity(0)))
    device = open_device(settings.device, settings.cuda_levers)
    loaded = load(settings, device.torch_device)
    engine = Engine(settings, loaded, memory_sizes(settings, loaded, device), device)
    log.info("%s on %s, ready after %.1f s", loaded.model_type, loaded.device, loaded.load_seconds)
    return engine
