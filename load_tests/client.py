"""One streamed `/v1/completions` request, timed from the outside as its user sees it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import msgspec

from load_tests.trace import TraceRequest

Clock = Callable[[], float]  # seconds since the start of the run


class Target(msgspec.Struct, frozen=True):
    """The server under test, and which extensions of the OpenAI API to ask it for."""

    url: str  # with or without a trailing /v1
    base_model: str = "base"  # what `model` says in requests that name no adapter
    ignore_eos: bool = True  # always make max_tokens tokens, so that every server does the same work
    return_token_ids: bool = True  # exact token counts and exact comparison of answers
    usage: bool = True  # stream_options.include_usage: token counts where there are no token ids
    timeout_s: float = 600.0  # for a whole request
    api_key: str | None = None

    @property
    def completions_url(self) -> str:
        root = self.url.rstrip("/").removesuffix("/v1")
        return f"{root}/v1/completions"

    def body(self, request: TraceRequest) -> dict[str, Any]:
        """The JSON body of `request`: greedy, streamed."""
        body: dict[str, Any] = {
            "model": self.base_model if request.adapter is None else request.adapter,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "stream": True,
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.return_token_ids:
            body["return_token_ids"] = True
        if self.usage:
            body["stream_options"] = {"include_usage": True}
        return body


class Record(msgspec.Struct):
    """What became of one request. All times are seconds; latencies count from `start_s`."""

    id: int
    adapter: str | None
    rank: int
    start_s: float  # when it was due (open loop) or taken up by a worker (closed loop), since the run's start
    sent_s: float  # when it was really sent; much later than start_s means that the client is the bottleneck
    e2e_s: float  # until the stream ended or failed
    ttft_s: float | None = None  # None: no token came
    gaps_s: list[float] = []  # before each further token; tokens of one chunk after its first count 0
    output_tokens: int = 0
    prompt_tokens: int | None = None
    token_ids: list[int] | None = None  # None: the server does not return them
    text: str = ""
    finish_reason: str | None = None
    adapter_version: str | None = None
    error: str | None = None  # "kind: detail"; None: answered


class _Choice(msgspec.Struct):
    text: str | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    adapter_version: str | None = None
    error: Any = None


class _NoAnswerError(Exception):
    """The server said no, or its stream is not a whole answer."""


class _Answer:
    """The stream of one request, as far as it came."""

    def __init__(self) -> None:
        self.token_times: list[float] = []
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self.usage: _Usage | None = None
        self.finish_reason: str | None = None
        self.adapter_version: str | None = None
        self.done = False

    def take(self, data: bytes, now: float) -> int:
        """Add one event; how many tokens it held. Raises _NoAnswerError for an error event."""
        if data == b"[DONE]":
            self.done = True
            return 0
        event = msgspec.json.decode(data, type=_Event)
        if event.error is not None:
            raise _NoAnswerError(f"error event: {_message(event.error)}")
        self.usage = event.usage or self.usage
        self.adapter_version = event.adapter_version or self.adapter_version
        tokens = 0
        for choice in event.choices:
            self.finish_reason = choice.finish_reason or self.finish_reason
            self.texts.append(choice.text or "")
            self.token_ids += choice.token_ids or []
            # without token ids, a chunk of text is taken for one token
            tokens += bool(choice.text) if choice.token_ids is None else len(choice.token_ids)
        self.token_times += [now] * tokens
        return tokens

    @property
    def output_tokens(self) -> int:
        if self.token_ids:
            return len(self.token_ids)
        return self.usage.completion_tokens if self.usage else len(self.token_times)

    def judge(self, asked: int, exact: bool) -> None:
        """Raises _NoAnswerError unless this is a whole answer; `exact`: of `asked` tokens, no fewer."""
        if not self.done:
            raise _NoAnswerError("stream cut off: no [DONE]")
        if self.finish_reason in ("error", "abort"):
            raise _NoAnswerError(f"finish_reason: {self.finish_reason}")
        if not self.output_tokens:
            raise _NoAnswerError("empty answer: no token")
        if exact and self.output_tokens != asked:
            raise _NoAnswerError(f"wrong length: {self.output_tokens} tokens of {asked}")


def open_session() -> aiohttp.ClientSession:
    """A session with no limit on connections: the trace alone decides how many are open."""
    # idle connections are dropped before a server's own limit (5 s in uvicorn) can race with a new request
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))


async def complete(
    session: aiohttp.ClientSession,
    target: Target,
    request: TraceRequest,
    clock: Clock,
    *,
    due_s: float | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Record:
    """Send `request` and read its stream to the end. Never raises for what the server or network does."""
    answer = _Answer()
    sent_s = clock()
    start_s = sent_s if due_s is None else due_s
    error = None
    try:
        async with asyncio.timeout(target.timeout_s):
            async for data, now in _events(session, target, request, clock):
                on_tokens(answer.take(data, now))
        answer.judge(request.max_tokens, exact=target.ignore_eos)
    except _NoAnswerError as failure:
        error = str(failure)
    except TimeoutError:
        error = f"timeout: {target.timeout_s:g} s"
    except (aiohttp.ClientError, OSError) as failure:
        error = f"connection: {type(failure).__name__}"
    except msgspec.DecodeError as failure:
        error = f"not an event: {failure}"
    return _record(request, answer, start_s, sent_s, clock(), error)


async def _events(
    session: aiohttp.ClientSession, target: Target, request: TraceRequest, clock: Clock
) -> AsyncIterator[tuple[bytes, float]]:
    """The data of each server-sent event and when it came."""
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    async with session.post(target.completions_url, json=target.body(request), headers=headers) as response:
        if response.status != 200:
            raise _NoAnswerError(f"HTTP {response.status}: {_message(await response.read())}")
        rest = b""
        async for chunk in response.content.iter_any():  # iter lines would limit their length
            now = clock()
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip(), now


def _message(error: Any) -> str:
    """The readable part of an error body or error event."""
    if isinstance(error, bytes):
        try:
            error = msgspec.json.decode(error)
        except msgspec.DecodeError:
            error = error.decode(errors="replace")
    if isinstance(error, dict):
        error = error.get("error", error)
    if isinstance(error, dict):
        error = error.get("message", error)
    return str(error)[:200]


def _record(
    request: TraceRequest, answer: _Answer, start_s: float, sent_s: float, end_s: float, error: str | None
) -> Record:
    times = answer.token_times
    return Record(
        id=request.id,
        adapter=request.adapter,
        rank=request.rank,
        start_s=start_s,
        sent_s=sent_s,
        e2e_s=end_s - start_s,
        ttft_s=times[0] - start_s if times else None,
        gaps_s=[later - earlier for earlier, later in itertools.pairwise(times)],
        output_tokens=answer.output_tokens,
        prompt_tokens=answer.usage.prompt_tokens if answer.usage else None,
        token_ids=answer.token_ids or None,
        text="".join(answer.texts),
        finish_reason=answer.finish_reason,
        adapter_version=answer.adapter_version,
        error=error,
    )
