"""One client request while it runs: its sequences in the engine, their outputs turned into text."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from types import TracebackType
from typing import Self

import msgspec

from server.api.inference.replies import ChoiceFinishReason
from server.api.waiting_room import Ticket
from server.border.client import EngineClient
from server.errors import (
    ChorusError,
    DamagedAdapter,
    DeadlineExceeded,
    InvalidGrammar,
    InvalidRequest,
    OutOfMemory,
    TooSlow,
    Unavailable,
)
from server.messages import ErrorCode, Logprobs, Request, TokenOutput
from server.telemetry.metrics import Metrics
from server.telemetry.sequence_metrics import SequenceTimes
from server.text.detokenizer import Detokenizer
from server.text.stop import StopAutomaton, StopStrings
from server.text.tokenizer import Tokenizer

_OUTPUTS_A_TURN = 16  # taken in before other tasks of the loop get their turn


class TextOptions(msgspec.Struct, frozen=True):
    """How tokens become the text that a client sees."""

    tokenizer: Tokenizer | None
    stops: StopAutomaton | None = None  # shared by the choices
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0  # no stop string is looked for before


class TokenLogprobs(msgspec.Struct, frozen=True, gc=False):
    """Log-probabilities of one sampled token, and where its text begins in the choice's text."""

    values: Logprobs
    text_offset: int


class Delta(msgspec.Struct, gc=False):
    """News of one choice: at least one token, or its end. `text` can lag behind `token_ids`.

    Or of its prompt, for all choices of that: the log-probabilities of the next tokens, and nothing else.
    """

    choice: Choice
    text: str
    token_ids: list[int]
    finish_reason: ChoiceFinishReason | None
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[Logprobs] | None = None


class Choice:
    """One sequence: what the engine was asked for, and its text so far.

    `request_id`: its own, that of the request or of one of its forks.
    """

    def __init__(
        self, index: int, prompt_index: int, request: Request, request_id: str, options: TextOptions
    ) -> None:
        self.index = index
        self.prompt_index = prompt_index
        self.request = request
        self.request_id = request_id
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.finish_reason: ChoiceFinishReason | None = None
        self._options = options
        self._detokenizer = (
            Detokenizer(options.tokenizer, skip_special_tokens=options.skip_special_tokens)
            if options.tokenizer
            else None
        )
        self._stops = StopStrings(options.stops, include=options.include_stop)
        self._characters = 0  # before its own, and decoded so far, shown or held back

    def begin_after(self, characters: int) -> None:
        """So many are shown before its own."""
        self._characters = characters

    def advance(self, output: TokenOutput) -> Delta:
        """Takes one engine output in. Raises the error that the engine ended the sequence with."""
        if output.error is not None or output.finish_reason in ("error", "abort"):
            raise engine_error(output)
        if output.prompt_logprobs is not None:
            return Delta(self, "", [], None, None, output.prompt_logprobs)
        if output.cached_tokens:
            self.cached_tokens = output.cached_tokens
        taken, pieces, offsets = 0, [], []
        for token_id in output.token_ids:
            taken += 1
            offsets.append(self._characters)
            hidden = token_id == output.stop_token and taken == len(output.token_ids)
            pieces.append(self._push(token_id, hidden=hidden))
            if self._stops.stopped:
                break
        if self._stops.stopped:
            self.finish_reason = "stop"
        elif output.finish_reason is not None:
            self.finish_reason = "length" if output.finish_reason == "length" else "stop"
            pieces.append(self._flush())
        logprobs = None
        if output.logprobs is not None:
            logprobs = [TokenLogprobs(v, at) for v, at in zip(output.logprobs, offsets, strict=False)]
        return Delta(self, "".join(pieces), output.token_ids[:taken], self.finish_reason, logprobs)

    def _push(self, token_id: int, *, hidden: bool) -> str:
        self.completion_tokens += 1
        if self._detokenizer is None or (hidden and not self._options.include_stop):
            return ""
        return self._show(self._detokenizer.push(token_id))

    def _show(self, piece: str) -> str:
        self._characters += len(piece)
        if self.completion_tokens <= self._options.min_tokens:
            return piece
        return self._stops.push(piece)

    def _flush(self) -> str:
        """The end by the engine's word: the last half character, then what may have become a stop string."""
        if self._detokenizer is None:
            return ""
        shown = self._show(self._detokenizer.flush())
        return shown if self._stops.stopped else shown + self._stops.flush()


class ClientGone(Exception):
    """The client closed its connection; nobody is left to answer."""


# What a delta takes, about, as objects here and as JSON later. Bytes.
_DELTA_BYTES, _TOKEN_BYTES, _LOGPROB_BYTES = 200, 40, 100


def size_of(delta: Delta) -> int:
    """Bytes, about."""
    size = _DELTA_BYTES + len(delta.text) + _TOKEN_BYTES * len(delta.token_ids)
    if delta.logprobs is not None:
        size += _LOGPROB_BYTES * sum(1 + len(token.values.top) for token in delta.logprobs)
    return size + _LOGPROB_BYTES * sum(1 + len(token.top) for token in delta.prompt_logprobs or ())


class Generation:
    """Runs the choices side by side; hands out what is ready, many deltas at a time.

    `async with` starts it and, on every way out, ends what still runs in the engine. While the taker waits
    for the client to read, at most `most_waiting` bytes, about, are kept; then it all fails with TooSlow.
    """

    def __init__(
        self,
        engine: EngineClient,
        choices: list[Choice],
        metrics: Metrics,
        ticket: Ticket,
        most_waiting: int,
    ) -> None:
        self.choices = choices
        self._ticket = ticket
        self._engine = engine
        self.times: dict[str, SequenceTimes] = {}  # of each choice that the engine was asked for, by its id
        self._metrics = metrics.sequences
        self._ready: list[Delta] = []
        self._waiting = 0  # bytes of `_ready`
        self._most_waiting = most_waiting
        self._handing_over = False  # the taker waits for the client
        self._patience: asyncio.Timeout | None = None
        self._wake = asyncio.Event()
        self._failure: Exception | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._open = 0  # tasks

    async def __aenter__(self) -> Self:
        by_request: dict[str, list[Choice]] = {}
        for choice in self.choices:
            by_request.setdefault(choice.request.request_id, []).append(choice)
        self._open = len(by_request)
        self._tasks = [asyncio.create_task(self._follow(choices)) for choices in by_request.values()]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def fail(self, error: Exception) -> None:
        """End all of it: `take` raises `error` once what is ready was taken. The first one counts."""
        if self._failure is not None:
            return
        self._failure = error
        self._wake.set()
        if self._patience is not None and self._handing_over:
            self._patience.reschedule(-math.inf)

    @asynccontextmanager
    async def handing_over(self) -> AsyncIterator[None]:
        """Around the taker's loop: a failure ends its waiting for a client that does not read. Raises it."""
        try:
            async with asyncio.timeout(None) as self._patience:
                yield
        except TimeoutError:
            raise self._failure or TimeoutError from None
        finally:
            self._patience = None

    async def hand_over(self, sending: Awaitable[None]) -> None:
        """Wait for the client to be sent what it is told."""
        self._handing_over = True
        await sending
        self._handing_over = False

    async def take(self) -> list[Delta]:
        """All that is ready, waiting for at least one; empty at the end. Raises what ended it early."""
        while not self._ready:
            if self._failure is not None:
                raise self._failure
            if not self._open:
                return []
            self._wake.clear()
            await self._wake.wait()
        if isinstance(self._failure, ClientGone):
            raise self._failure
        ready, self._ready, self._waiting = self._ready, [], 0
        return ready

    async def _follow(self, choices: list[Choice]) -> None:
        request, failure = choices[0].request, None
        times = self._metrics.begin(request)
        self.times.update(zip((choice.request_id for choice in choices), times, strict=True))
        try:
            await self._run(request, {choice.request_id: choice for choice in choices})
        except Exception as error:
            failure = error
            self.fail(error)
        finally:
            self._metrics.prompt_ended(times, failure)
            self._open -= 1
            self._wake.set()

    async def _run(self, request: Request, running: dict[str, Choice]) -> None:
        async with aclosing(self._engine.generate(request)) as outputs:
            taken = 0
            async for output in outputs:
                taken += 1
                if taken % _OUTPUTS_A_TURN == 0:  # many are ready where the loop was held up
                    await asyncio.sleep(0)
                choice = running.get(output.request_id)
                if choice is None:
                    continue  # of after its stop string
                delta = choice.advance(output)
                if delta.choice.completion_tokens == len(delta.token_ids):
                    self._ticket.started()
                if delta.token_ids:
                    self._metrics.output(self.times[output.request_id], output, len(delta.token_ids))
                self._put(delta)
                if delta.finish_reason is not None:
                    self._metrics.end(self.times[output.request_id], delta.finish_reason)
                    del running[output.request_id]
                    if output.finish_reason is None:  # a stop string, of which the engine knows nothing
                        self._engine.abort(output.request_id)
                    if not running:
                        return
        raise ChorusError("The engine ended this request without a reason.", code="internal_error")

    def _put(self, delta: Delta) -> None:
        """Raises TooSlow, and ends every choice, when too much waits."""
        self._ready.append(delta)
        self._waiting += size_of(delta)
        if self._handing_over and self._waiting > self._most_waiting:
            self._ready, self._waiting = [], 0
            for task in self._tasks:
                if task is not asyncio.current_task():
                    task.cancel()
            raise TooSlow("The client did not read its stream, and too much of it waited.")
        self._wake.set()


def engine_error(output: TokenOutput) -> ChorusError:
    """What a client is told when the engine ends a sequence with an error."""
    text = output.message
    match output.error:
        case ErrorCode.NEVER_FITS:
            return InvalidRequest(text or "The request can never fit.", param="prompt", code="never_fits")
        case ErrorCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(text or "The request's time was over.", param="timeout")
        case ErrorCode.GRAMMAR:
            return InvalidGrammar(f"The grammar of this request cannot be followed: {text}.")
        case ErrorCode.NO_TOKEN_LEFT:
            fields = text.split(", ")
            reason = f"Nothing can come next: {' and '.join(fields)} leave no token."
            return InvalidRequest(reason, param=fields[0], code="no_token_left")
        case ErrorCode.OUT_OF_MEMORY:
            return OutOfMemory(text or "There is no accelerator memory for this request now.")
        case ErrorCode.ADAPTER_LOAD_FAILED:
            return ChorusError(text or "The adapter could not be loaded.", code="adapter_load_failed")
        case ErrorCode.ADAPTER_DAMAGED:
            return DamagedAdapter("The stored files of the adapter are damaged; upload it again.")
        case ErrorCode.NON_FINITE:
            return ChorusError(
                text or "The model gave logits that are not finite numbers.", code="non_finite_logits"
            )
        case ErrorCode.INTERNAL:  # its text is an exception's, for the log
            return ChorusError("The engine made an error.", code="internal_error")
    return Unavailable("The engine ended this request.", code="aborted")
