"""What has come on all connections together and waits for a turn of the event loop. Less is read at once
while that is much.

A loop reads from every connection that has something before anything of it is looked at, up to 256 KiB from
each: of 4,000 that send at once half a gigabyte. Nobody's reading is stopped for it, as a probe's must not.
"""

from __future__ import annotations

import asyncio

_MUCH = 64 * 2**20  # bytes that wait
_READ, _READ_OF_MUCH = 256 * 2**10, 16 * 2**10  # bytes, in one call


class Intake:
    """Of one server. `waiting`: bytes that have come and wait for their turn, kept by who lines them up."""

    def __init__(self, much: int = _MUCH) -> None:
        self.waiting = 0
        self._much = much
        self._room = memoryview(bytearray(_READ))
        self._little = self._room[:_READ_OF_MUCH]

    @property
    def room(self) -> memoryview:
        """For the next read. All share it: what was read is taken before another read begins."""
        return self._little if self.waiting > self._much else self._room

    def take(self, size: int) -> bytes:
        """What was read."""
        return bytes(self._room[:size])


class Inlet(asyncio.BufferedProtocol):
    """Hands a protocol what comes, read into the room of the intake."""

    def __init__(self, protocol: asyncio.Protocol, intake: Intake) -> None:
        self._intake = intake
        self._hand_on = protocol.data_received
        self.connection_made = protocol.connection_made  # type: ignore[method-assign]  # without another call
        self.connection_lost = protocol.connection_lost  # type: ignore[method-assign]  # as above
        self.eof_received = protocol.eof_received  # type: ignore[method-assign]  # as above
        self.pause_writing = protocol.pause_writing  # type: ignore[method-assign]  # as above
        self.resume_writing = protocol.resume_writing  # type: ignore[method-assign]  # as above

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._intake.room

    def buffer_updated(self, nbytes: int) -> None:
        self._hand_on(self._intake.take(nbytes))
