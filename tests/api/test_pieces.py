"""Large bodies: sent piece by piece, with turns of the loop between them."""

from __future__ import annotations

import asyncio
from typing import Any

from server.api.pieces import JSONPieces


async def test_a_large_body_goes_out_in_pieces_and_lets_others_run() -> None:
    sent: list[Any] = []
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def send(message: Any) -> None:
        sent.append(message)

    pieces = [b"[", bytearray(b"1," * 200_000), *[b"2,"] * 50_000, b"3]"]
    counter = asyncio.create_task(count())
    await JSONPieces(pieces)({"type": "http"}, None, send)  # type: ignore[arg-type]  # receives nothing
    counter.cancel()
    start, *bodies = sent
    assert b"".join(message["body"] for message in bodies) == b"".join(pieces)
    assert (b"content-length", str(sum(map(len, pieces))).encode()) in start["headers"]
    assert (b"content-type", b"application/json") in start["headers"]
    assert max(len(message["body"]) for message in bodies) < 2 * 64 * 2**10
    assert [message["more_body"] for message in bodies] == [True] * (len(bodies) - 1) + [False]
    assert turns >= len(bodies) - 1
