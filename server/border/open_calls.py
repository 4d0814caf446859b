"""What the face waits for from the engine: outputs of requests, answers to adapter calls."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from server.border.stream import OutputStream
from server.errors import ChorusError
from server.messages import AdapterResult, TokenOutput
from server.turns import Turns

_WOKEN_AT_ONCE = 32  # streams, in a turn of the loop; hundreds may end in the same step


class OpenCalls:
    """Streams and adapter calls without an end yet. Use it from one event loop."""

    def __init__(self) -> None:
        self._streams: dict[str, OutputStream] = {}  # choices of one request have the same
        self._calls: dict[int, asyncio.Future[AdapterResult]] = {}
        self._call_ids = itertools.count(1)
        self._turns = Turns(_WOKEN_AT_ONCE)

    @contextmanager
    def stream(self, request_ids: Sequence[str]) -> Iterator[OutputStream]:
        """Where the outputs of these choices arrive meanwhile."""
        stream = OutputStream(request_ids, self._turns)
        self._streams.update(dict.fromkeys(request_ids, stream))
        try:
            yield stream
        finally:
            for request_id in request_ids:
                del self._streams[request_id]

    def give_up(self, request_id: str) -> bool:
        """Expect no more of this choice. False where nothing was expected."""
        stream = self._streams.get(request_id)
        if stream is None or request_id not in stream.running:
            return False
        stream.give_up(request_id)
        return True

    @contextmanager
    def call(self) -> Iterator[tuple[int, asyncio.Future[AdapterResult]]]:
        """A new call's number, and where its answer arrives meanwhile."""
        call_id = next(self._call_ids)
        answer = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            yield call_id, answer
        finally:
            del self._calls[call_id]

    def push(self, outputs: Sequence[TokenOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:  # else it was aborted meanwhile
                stream.push(output)

    def answer(self, result: AdapterResult) -> None:
        answer = self._calls.get(result.call_id)
        if answer is not None and not answer.done():
            answer.set_result(result)

    def fail(self, error: Callable[[], ChorusError]) -> None:
        """End everything with an error of its own."""
        for stream in self._streams.values():
            stream.fail(error())
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error())
