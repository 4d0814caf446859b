"""The face's hold on one reader process: starts it, asks it, ends it."""

from __future__ import annotations

import asyncio
import logging
import signal

import msgspec

from server.api.reading.messages import (
    HEAD,
    TEXT_FIELDS,
    ReadAnswer,
    ReaderStart,
    ReadJob,
    frame,
    job_frames,
)
from server.border.program import program
from server.errors import ChorusError, InvalidRequest

logger = logging.getLogger(__name__)

_WAIT_S = 120.0  # by the clock on the wall, for a process that the kernel's limits have not ended
_ENOUGH_BYTES = 512 * 2**20  # resident: a process that holds more is replaced
_END_S = 5.0  # after the end of its input, before SIGKILL


class ReaderProcess:
    """One process, one job at a time."""

    def __init__(self, start: ReaderStart) -> None:
        self._start = start
        self._child: asyncio.subprocess.Process | None = None
        self._decoder = msgspec.msgpack.Decoder(ReadAnswer)

    async def start(self) -> None:
        """Done by `ask` too, where it is wanting. Raises OSError."""
        if self._child is not None and self._child.returncode is None:
            return
        await self.end()
        self._child = await asyncio.create_subprocess_exec(
            *program("server.api.reading.child"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # signals to the face's process group are for the face alone
        )
        assert self._child.stdin is not None  # asked for above
        self._child.stdin.write(frame(self._start))

    async def ask(self, job: ReadJob) -> ReadAnswer:
        """Raises InvalidRequest for a body over which a limit ended the process, ChorusError, OSError."""
        await self.start()
        answered = False
        try:
            async with asyncio.timeout(_WAIT_S):
                answer = await self._exchange(job)
            answered = answer.resident_bytes <= _ENOUGH_BYTES and not answer.last
            return answer
        except (asyncio.IncompleteReadError, ConnectionError):
            raise self._refusal(job, await self.end()) from None
        except TimeoutError:
            raise self._refusal(job, -signal.SIGPROF) from None
        finally:
            if not answered:  # it would answer the next job with this one's, or holds too much
                await self.end(kill=True)

    async def end(self, *, kill: bool = False) -> int:
        """The exit code (negative: minus the signal); 0 where there is no process."""
        child, self._child = self._child, None
        if child is None:
            return 0
        if kill and child.returncode is None:
            child.kill()
        assert child.stdin is not None  # asked for at its start
        child.stdin.close()
        try:
            return await asyncio.wait_for(child.wait(), _END_S)
        except TimeoutError:
            child.kill()
            return await child.wait()

    async def _exchange(self, job: ReadJob) -> ReadAnswer:
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        for part in job_frames(job):
            child.stdin.write(part)
            await child.stdin.drain()
        (size,) = HEAD.unpack(await child.stdout.readexactly(HEAD.size))
        return self._decoder.decode(await child.stdout.readexactly(size))

    def _refusal(self, job: ReadJob, code: int) -> ChorusError:
        """What a client is told when the process ended with `code` over its body."""
        logger.warning("a reader process ended with code %d over a body of %d bytes", code, len(job.body))
        field = TEXT_FIELDS[job.kind]
        match -code:
            case signal.SIGVTALRM:
                reason = f"{field}: the chat template took longer than {self._start.render_s:g} s"
            case signal.SIGPROF:
                reason = f"{field}: to read it takes longer than {self._start.job_s:g} s"
            case signal.SIGABRT | signal.SIGKILL | signal.SIGSEGV:
                reason = f"{field}: to read it takes more memory than one request may have"
            case _:
                return ChorusError("The request could not be read.", code="internal_error")
        return InvalidRequest(reason, param=field)
