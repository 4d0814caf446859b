"""The program of a reader process: takes bodies from its standard input, answers on its standard output.

It is where hostile input ends: what takes too long or too much memory ends this process by a limit of the
kernel's (`ReaderStart`; SIGVTALRM for a template, SIGPROF for all of a job), and nobody else. A chat template
is a program, and no thread that runs one can be stopped.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from server.api.inference.structured import GUIDED_FIELDS, Guide
from server.api.reading.messages import (
    HEAD,
    TEXT_FIELDS,
    ReadAnswer,
    ReadError,
    ReaderStart,
    ReadJob,
    frame,
    ids_to_bytes,
)
from server.api.reading.reader import ChatPrompt, NotHere, R, Reader, Reading
from server.api.reading.watch import at_most
from server.errors import ChorusError, InvalidGrammar
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer
from server.text.tool_calls import STYLES

logger = logging.getLogger(__name__)

# The answer says them in other words, or the face has no use for them.
_LEFT_OUT = {"prompt", "messages", "chat_template", "chat_template_kwargs", "documents", *GUIDED_FIELDS}


class _TimedReader(Reader):
    """Renders templates and compiles grammars against the clock."""

    def __init__(
        self, tokenizer: Tokenizer | None, template: ChatTemplate | None, start: ReaderStart
    ) -> None:
        super().__init__(tokenizer, template, STYLES.get(start.tool_style or ""))
        self._start = start
        self.give_up: Callable[[ReadAnswer], None] = lambda answer: None  # says it: the process then ends

    def render(self, template: ChatTemplate | str, prompt: ChatPrompt) -> str:
        signal.setitimer(signal.ITIMER_VIRTUAL, self._start.render_s)
        try:
            return super().render(template, prompt)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def judged(self, guide: Guide, job: ReadJob) -> str:
        if job.compiles:
            self.vocabulary(job)  # its time is not the client's
        late = f"{guide.field}: to compile it takes longer than {self._start.grammar_s:g} s"
        error = ReadError(late, guide.field, InvalidGrammar.code)
        with at_most(self._start.grammar_s, lambda: self.give_up(ReadAnswer(error=error, last=True))):
            return super().judged(guide, job)


def main() -> None:
    """Runs until its standard input ends."""
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything here prints is no answer
    for number in (signal.SIGPROF, signal.SIGVTALRM):
        signal.signal(number, signal.SIG_DFL)
    start = msgspec.msgpack.decode(_receive(jobs), type=ReaderStart)
    signal.setitimer(signal.ITIMER_PROF, start.job_s)
    reader = _reader(start)

    def say(reply: ReadAnswer) -> None:
        answers.write(frame(reply))
        answers.flush()

    reader.give_up = say
    limit = _pages(0) + start.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while payload := _receive(jobs):
        signal.setitimer(signal.ITIMER_PROF, start.job_s)
        job = msgspec.msgpack.decode(payload, type=ReadJob)
        reply = answer(reader, msgspec.structs.replace(job, body=_receive(jobs)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        say(reply)


def _reader(start: ReaderStart) -> _TimedReader:
    folder = Path(start.folder)
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.load(folder, tokenizer.special_tokens) if tokenizer else None
    if tokenizer is not None:
        tokenizer.bound  # noqa: B018 (made now, not within the first job)
    return _TimedReader(tokenizer, template, start)


def _receive(stream: BinaryIO) -> bytes:
    """The next frame's payload; empty at the end."""
    head = stream.read(HEAD.size)
    return stream.read(HEAD.unpack(head)[0]) if len(head) == HEAD.size else b""


def answer(reader: Reader, job: ReadJob) -> ReadAnswer:
    """What is said to a job."""
    try:
        said = _read(reader, job)
    except NotHere:
        said = ReadAnswer(not_here=True)
    except MemoryError:
        field = TEXT_FIELDS[job.kind]
        said = ReadAnswer(error=ReadError(f"{field}: to read it takes more memory than one may have", field))
    except ChorusError as error:
        said = ReadAnswer(error=ReadError(error.message, error.param, error.code))
    except Exception:
        logger.exception("unexpected error while a body was read")
        said = ReadAnswer(error=ReadError("", internal=True))
    return msgspec.structs.replace(said, resident_bytes=_pages(1))


def _read(reader: Reader, job: ReadJob) -> ReadAnswer:
    match job.kind:
        case "completions":
            return _of_reading(reader.completions(job))
        case "chat":
            return _of_reading(reader.chat(job))
        case "tokenize":
            return ReadAnswer(answer=reader.tokenize(job))
        case "detokenize":
            return ReadAnswer(answer=reader.detokenize(job))


def _of_reading(reading: Reading[R]) -> ReadAnswer:
    fields = reading.request.model_dump_json(exclude=_LEFT_OUT, exclude_unset=True)
    return ReadAnswer(
        fields=fields.encode(),
        prompts=[ids_to_bytes(ids) for ids in reading.prompts],
        echoes=reading.echoes,
        grammar=reading.grammar,
        ignored=reading.ignored,
        in_thought=reading.in_thought,
    )


def _pages(at: int) -> int:
    """0: the process's address space, 1: what of it is resident; bytes."""
    return int(Path("/proc/self/statm").read_text().split()[at]) * resource.getpagesize()
