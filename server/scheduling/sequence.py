"""The engine's state of one choice of one request."""

from __future__ import annotations

import enum
import secrets
from copy import copy
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from server.messages import AdapterRef, FinishReason, Fork, Logprobs, Request, SamplingParams, TokenOutput

Tokens = npt.NDArray[np.int64]
MixKey = tuple[tuple[str, float], ...]  # (digest, weight) of each adapter; () is the base model

_SCORES_AN_OUTPUT = 32  # tokens: who reads them does other things between two outputs
UNREAD = -1  # stands for a token that is not known yet


def _seed(seed: int | None) -> int:
    return secrets.randbits(63) if seed is None else seed


class State(enum.Enum):
    WAITING = "waiting"
    WAITING_FOR_ADAPTER = "waiting_for_adapter"  # passed over: its adapters are on their way or lack room
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Tokens, cache position and limits of one choice. The scheduler alone changes it.

    `order` is the place in the line of arrivals: of two sequences the one with the smaller order is the
    older. `arrival` and `deadline` are in seconds of the scheduler's clock. `digests` are of the adapters it
    needs.
    """

    __slots__ = (
        "_buffer",
        "adapters",
        "arrival",
        "block_hashes",
        "block_ids",
        "cache_salt",
        "cached_tokens",
        "deadline",
        "digests",
        "group",
        "guide",
        "last_token",
        "logits_state",
        "max_length",
        "mix_key",
        "num_computed",
        "num_preemptions",
        "num_prompt_tokens",
        "num_scored",
        "num_tokens",
        "num_unread",
        "order",
        "priority",
        "request_id",
        "sampling",
        "seed",
        "started_at",
        "state",
        "stop_ids",
        "tenant",
        "timeout_s",
        "waited_for_adapter",
        "was_too_large",
        "weight",
    )

    def __init__(self, request: Request, arrival: float, order: int) -> None:
        self.request_id: str = request.request_id
        self.sampling: SamplingParams = request.sampling
        self.adapters: tuple[AdapterRef, ...] = request.adapters
        self.mix_key: MixKey = tuple((ref.digest, ref.weight) for ref in request.adapters)
        self.digests = frozenset(ref.digest for ref in request.adapters)
        self.seed: int = _seed(request.sampling.seed)
        self.tenant: str = request.tenant
        self.cache_salt: str = request.cache_salt
        self.weight: float = request.weight
        self.priority: int = request.priority
        self.timeout_s: float | None = request.timeout_s
        self.arrival = arrival
        self.deadline = None if request.timeout_s is None else arrival + request.timeout_s
        self.order = order

        self._buffer: Tokens = np.array(request.prompt_token_ids, dtype=np.int64)
        self.num_prompt_tokens = self.num_tokens = len(self._buffer)
        # Prompt tokens whose next one's log-probability was told; all but the last where nobody asks.
        self.num_scored = 0 if self.sampling.prompt_logprobs is not None else self.num_prompt_tokens - 1
        self.num_unread = 0  # tokens at the end that the device has taken and the host has not read
        self.last_token: int = request.prompt_token_ids[-1] if request.prompt_token_ids else -1

        self.state = State.WAITING
        self.num_computed = 0  # tokens whose K and V are in the cache
        self.block_ids: list[int] = []  # block i holds tokens [i * block_size, (i + 1) * block_size)
        self.block_hashes: list[bytes] = []  # of the full blocks from the first on, as far as needed yet
        self.cached_tokens = 0  # prompt tokens that the prefix cache gave at the first admission
        self.logits_state: dict[str, Any] = {}  # what logits processors keep from step to step
        self.guide: Any = None  # its output's grammar, which choices share; None: anything goes
        self.group: PromptGroup | None = None  # of the choices that its prompt is computed for
        self.num_preemptions = 0
        self.started_at: float | None = None  # when it first left the line, by the scheduler's clock
        self.waited_for_adapter = False  # then: its adapters were what it had waited for last
        self.was_too_large = False  # a step ran out of memory with it, and it has got no token since
        self.stop_ids: frozenset[int] = frozenset(self.sampling.stop_token_ids)
        self.max_length = self.num_prompt_tokens + self.sampling.max_tokens  # prompt and output, tokens

    def __repr__(self) -> str:
        return f"Sequence({self.request_id!r}, {self.state.value}, {self.num_computed}/{self.num_tokens})"

    def fork(self, choice: Fork, order: int) -> Sequence:
        """Another choice of the same request, as new as this one still is."""
        other = copy(self)
        other.request_id, other.seed, other.order = choice.request_id, _seed(choice.seed), order
        other._buffer, other.num_scored = self._buffer.copy(), self.num_prompt_tokens - 1
        other.block_ids, other.block_hashes, other.logits_state = [], [], {}
        return other

    def limit(self, eos_token_ids: frozenset[int], max_model_len: int) -> None:
        """Take on the model's own limits beside the request's."""
        self.max_length = min(self.max_length, max_model_len)
        if not self.sampling.ignore_eos or self.sampling.grammar is not None:
            self.stop_ids |= eos_token_ids

    def forget_unread(self) -> None:
        """The tokens that were expected will never be known; nothing of it is in the cache any more."""
        self.num_tokens -= self.num_unread
        self.num_unread = self.num_computed = 0
        self.last_token = int(self._buffer[self.num_tokens - 1])

    @property
    def tokens(self) -> Tokens:
        """Prompt and output, [num_tokens] int64: a view, valid until the next `append`."""
        return self._buffer[: self.num_tokens]

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_unscored(self) -> int:
        """How many log-probabilities of prompt tokens are still to be told."""
        return self.num_prompt_tokens - 1 - self.num_scored

    @property
    def is_prompt_alone(self) -> bool:
        """Whether it ends with its prompt."""
        return self.sampling.max_tokens == 0

    @property
    def is_full(self) -> bool:
        """Whether its newest token is the last one that it may have."""
        return self.num_tokens >= self.max_length

    def expect(self) -> None:
        """Count a generated token before it is known: `take` fills it in."""
        self.append(UNREAD)
        self.num_unread += 1

    def start(self, now: float) -> None:
        """It runs: for the first time at `now`, seconds of the scheduler's clock, or again."""
        if self.started_at is None:
            self.started_at = now
            self.waited_for_adapter = self.state is State.WAITING_FOR_ADAPTER
        self.state = State.RUNNING

    def take(self, token: int) -> FinishReason | None:
        """The next generated token: one that was expected, or one more. Returns why it is the last one."""
        if self.num_unread:
            place = self.num_tokens - self.num_unread
            self._buffer[place] = token
            self.num_unread -= 1
            if not self.num_unread:
                self.last_token = token
        else:
            place = self.num_tokens
            self.append(token)
        if token in self.stop_ids and self._may_stop(place):
            return "stop"
        return "length" if place + 1 >= self.max_length else None

    def _may_stop(self, place: int) -> bool:
        """Whether a stop token at this place ends it. Where a grammar ends before `min_tokens`, nothing else
        can come."""
        long_enough = place - self.num_prompt_tokens + 1 >= self.sampling.min_tokens
        return long_enough or self.guide is not None

    def output(
        self, tokens: list[int], reason: FinishReason | None, logprobs: list[Logprobs], *, first: bool
    ) -> TokenOutput:
        """What is told of the tokens that a step gave it; with the `first` ones, how it began."""
        output = TokenOutput(
            self.request_id,
            tokens,
            finish_reason=reason,
            stop_token=tokens[-1] if reason == "stop" else None,
            logprobs=logprobs or None,
        )
        if not first:
            return output
        return msgspec.structs.replace(
            output,
            cached_tokens=self.cached_tokens,
            started_at=self.started_at,
            waited_for_adapter=self.waited_for_adapter,
        )

    def scored(self, logprobs: list[Logprobs]) -> list[TokenOutput]:
        """What is told of the next prompt tokens' log-probabilities, a few in each output."""
        self.num_scored += len(logprobs)
        starts = range(0, len(logprobs), _SCORES_AN_OUTPUT)
        return [
            TokenOutput(self.request_id, [], prompt_logprobs=logprobs[at : at + _SCORES_AN_OUTPUT])
            for at in starts
        ]

    def append(self, token: int) -> None:
        """Add a generated token."""
        if self.num_tokens == len(self._buffer):
            grown = np.empty(2 * self.num_tokens + 16, dtype=np.int64)
            grown[: self.num_tokens] = self._buffer
            self._buffer = grown
        self._buffer[self.num_tokens] = token
        self.num_tokens += 1
        self.last_token = token


class PromptGroup:
    """The choices of one request.

    `first`: the one that is told the prompt's log-probabilities, where anybody asks for them.
    `leader`: the running sequence that computes the prompt while others wait; None when nobody does.
    `block_ids`: of the whole prompt, computed, with a reference to each for the group; empty when there are
    none, or when the room was needed: the next one to start is then the leader.
    """

    def __init__(self, sequences: list[Sequence]) -> None:
        self.first = sequences[0]
        self.leader: Sequence | None = None
        self.block_ids: list[int] = []
        self.waiting = set(sequences)  # that have not started yet
        for seq in self.waiting:
            seq.group = self
