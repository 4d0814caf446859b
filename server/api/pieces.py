"""A JSON body that is large, sent in pieces: other tasks of the loop get their turn between them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

_SENT = 64 * 2**10  # bytes at a time


class JSONPieces(Response):
    """`pieces` joined are the body."""

    media_type = "application/json"

    def __init__(self, pieces: Iterable[bytes | bytearray]) -> None:
        super().__init__()
        self._pieces = list(pieces)
        self.headers["content-length"] = str(sum(map(len, self._pieces)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        ready = bytearray()
        for piece in self._pieces:
            for start in range(0, len(piece), _SENT):
                ready += piece[start : start + _SENT]
                if len(ready) >= _SENT:
                    await send({"type": "http.response.body", "body": bytes(ready), "more_body": True})
                    ready.clear()
                    await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": bytes(ready), "more_body": False})
