"""Who reads the bodies of requests: this process where that is quickly done, else one of two others."""

from __future__ import annotations

import asyncio
import logging
from typing import TypeVar

import msgspec
from pydantic_core import from_json

from server.api.inference.schemas import ChatRequest, CompletionRequest, GenerationRequest
from server.api.inference.structured import GUIDED_FIELDS
from server.api.reading.messages import (
    DEFAULT_RULES,
    BodyKind,
    ReadAnswer,
    ReadError,
    ReaderStart,
    ReadJob,
    ReadRules,
    ids_of_bytes,
)
from server.api.reading.process import ReaderProcess
from server.api.reading.reader import NotHere, Reader, Reading
from server.errors import ChorusError, InvalidRequest, Unavailable
from server.messages import EngineInfo
from server.text.tokenizer import Tokenizer

R = TypeVar("R", bound=GenerationRequest)

_INLINE = 1024  # bytes; to read so few takes a millisecond or two
_LARGE = 256 * 2**10  # bytes; to read more takes seconds, for which nobody with less waits
_MOST_SMALL = 256  # bodies that wait or are read, of each size
_MOST_LARGE = 8
_MOST_GUIDED = 64  # whose grammars are compiled: nobody else waits for that
_GUIDED_NAMES = [f'"{name}"'.encode() for name in sorted(GUIDED_FIELDS)]
_MOST_TOLD = 256  # unknown fields in the log
_IDS_A_TURN = 2**16  # token ids unpacked before other tasks of the loop get their turn

logger = logging.getLogger(__name__)

_WITHOUT_TEXT = {
    CompletionRequest: {"prompt": ""},
    ChatRequest: {"messages": [{"role": "user", "content": ""}]},
}


class Readers:
    """Bodies to requests and token ids, with the tokenizer and the chat template of one folder.

    Bodies that say less than a kibibyte and run no template are read at once. All others go to a process:
    large ones to one, those with a grammar to another, the rest to a third, each in turn. Raises what
    `Reader` does, and Unavailable when too many wait.
    """

    def __init__(
        self, start: ReaderStart, tokenizer: Tokenizer | None, rules: ReadRules = DEFAULT_RULES
    ) -> None:
        """`tokenizer`: the one of the folder that `start` names."""
        self.rules = rules
        self._told: set[str] = set()  # unknown fields that the log has
        self._inline = Reader(tokenizer, None)
        self._small = _Line(start, _MOST_SMALL)
        self._large = _Line(start, _MOST_LARGE)
        self._guided = _Line(start, _MOST_GUIDED)

    async def start(self) -> None:
        """So that the first request does not wait for the start of a process. Raises OSError."""
        await self._small.start()

    async def close(self) -> None:
        await asyncio.gather(self._small.close(), self._large.close(), self._guided.close())

    async def completions(self, body: bytes, info: EngineInfo) -> Reading[CompletionRequest]:
        job = self._job("completions", body, info)
        reading = self._read_here(job) if len(body) <= _INLINE else None
        if reading is None:
            reading = await _reading(CompletionRequest, await self._ask(job))
        self._tell(reading.ignored)
        return reading

    def _read_here(self, job: ReadJob) -> Reading[CompletionRequest] | None:
        """None where that is not for this process."""
        try:
            return self._inline.completions(job)
        except NotHere:
            return None

    async def chat(self, body: bytes, info: EngineInfo) -> Reading[ChatRequest]:
        reading = await _reading(ChatRequest, await self._ask(self._job("chat", body, info)))
        self._tell(reading.ignored)
        return reading

    async def tokenize(self, body: bytes, info: EngineInfo) -> bytes:
        """The JSON of the answer."""
        return (await self._ask(self._job("tokenize", body, info))).answer

    async def detokenize(self, body: bytes, info: EngineInfo) -> bytes:
        """The JSON of the answer."""
        job = self._job("detokenize", body, info)
        if len(body) <= _INLINE:
            return self._inline.detokenize(job)
        return (await self._ask(job)).answer

    def _job(self, kind: BodyKind, body: bytes, info: EngineInfo) -> ReadJob:
        return ReadJob(kind, info.max_model_len, info.vocab_size, body, self.rules)

    def _tell(self, ignored: list[str]) -> None:
        """Each once, and no more than a client could fill the log with."""
        for name in ignored:
            if name not in self._told and len(self._told) < _MOST_TOLD:
                self._told.add(name)
                logger.warning("unknown field %a in a request: ignored from now on", name)

    async def _ask(self, job: ReadJob) -> ReadAnswer:
        answer = await self._answer(job)
        if answer.error is not None:
            raise _error(answer.error)
        return answer

    async def _answer(self, job: ReadJob) -> ReadAnswer:
        if len(job.body) > _LARGE:
            return await self._large.ask(msgspec.structs.replace(job, compiles=True))
        if not any(name in job.body for name in _GUIDED_NAMES):
            answer = await self._small.ask(job)
            if not answer.not_here:  # a name can be spelt in other ways
                return answer
        return await self._guided.ask(msgspec.structs.replace(job, compiles=True))


class _Line:
    """Jobs for one process, in order of arrival."""

    def __init__(self, start: ReaderStart, most: int) -> None:
        self._process = ReaderProcess(start)
        self._turn = asyncio.Lock()
        self._most = most
        self._jobs = 0

    async def start(self) -> None:
        async with self._turn:
            await self._process.start()

    async def close(self) -> None:
        async with self._turn:
            await self._process.end()

    async def ask(self, job: ReadJob) -> ReadAnswer:
        if self._jobs >= self._most:
            raise Unavailable("Too many requests wait to be read.", code="overloaded")
        self._jobs += 1
        try:
            async with self._turn:
                return await self._process.ask(job)
        finally:
            self._jobs -= 1


def _error(error: ReadError) -> ChorusError:
    if error.internal:
        return ChorusError("The server made an error while it read this request.", code="internal_error")
    return InvalidRequest(error.message, param=error.param, code=error.code)


async def _reading(kind: type[R], answer: ReadAnswer) -> Reading[R]:
    """The fields are few and were judged, so that to judge them again is no work."""
    request = kind.model_validate(from_json(answer.fields) | _WITHOUT_TEXT[kind])
    prompts, unpacked = [], 0
    for packed in answer.prompts:
        prompts.append(ids_of_bytes(packed))
        unpacked += len(prompts[-1])
        if unpacked > _IDS_A_TURN:
            unpacked = 0
            await asyncio.sleep(0)
    return Reading(request, prompts, answer.echoes, answer.grammar, answer.ignored, answer.in_thought)
