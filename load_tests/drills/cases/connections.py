"""Clients that misuse the connection itself."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence

from load_tests.drills.case import case, expect
from load_tests.drills.site import Site

_MIB = 2**20
_JSON = "content-type: application/json"
_LONGEST_S = 60.0


async def ends(reader: asyncio.StreamReader, within_s: float = _LONGEST_S) -> tuple[float, bytes]:
    """Reads to the end: after how many seconds, and what came. Raises TimeoutError."""
    began, got = time.monotonic(), b""
    with contextlib.suppress(ConnectionError):
        while data := await asyncio.wait_for(reader.read(65536), within_s):
            got += data
    return time.monotonic() - began, got


@contextlib.asynccontextmanager
async def connections(
    site: Site, count: int
) -> AsyncIterator[list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]:
    """As many as the server lets in, up to a count."""
    opened = []
    for _ in range(count):
        with contextlib.suppress(OSError):
            opened.append(await site.connect())
    try:
        yield opened
    finally:
        for _, writer in opened:
            writer.transport.abort()


async def _still_open(readers: Sequence[asyncio.StreamReader]) -> int:
    """How many have not been closed by the server."""
    await asyncio.sleep(0)
    return sum(not reader.at_eof() and reader.exception() is None for reader in readers)


@case(11, "slow header or body", "closed within 10 s (408); capacity kept")
async def slow_senders(site: Site) -> str:
    reader, writer = await site.connect()
    writer.write(site.head("GET /v1/models")[:-4])
    body_reader, body_writer = await site.connect()
    body_writer.write(site.head("POST /v1/completions", _JSON, "content-length: 1000") + b"\r\n{")
    (header_s, header_got), (body_s, body_got) = await asyncio.gather(ends(reader), ends(body_reader))
    for one in (writer, body_writer):
        one.close()
    seen = f"header closed after {header_s:.1f} s, body after {body_s:.1f} s: {body_got[:12]!r}"
    expect(max(header_s, body_s) <= 11, seen)
    expect(b" 408 " in body_got[:20] and (not header_got or b" 408 " in header_got[:20]), seen)
    return seen


@case(
    12,
    "a client that stops reading its stream",
    "bounded buffer, aborted at a deadline, KV freed",
    limit_s=300,
)
async def unread_stream(site: Site) -> str:
    asked = {
        "model": site.base,
        "prompt": "x",
        "n": 64,
        "max_tokens": 1500,
        "ignore_eos": True,
        "logprobs": 20,
        "stream": True,
        "temperature": 1,
    }
    before = (await site.books()).memory_mib
    reader, writer = await site.connect()
    reader._limit = 1024  # type: ignore[attr-defined]  # asyncio stops reading at twice this
    writer.write(site.posted(asked))
    began = time.monotonic()
    await asyncio.sleep(1)
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # of the socket transport
    await site.until(site.idle, "the engine to be idle", 280)
    seconds = time.monotonic() - began
    grown = (await site.books()).memory_mib - before
    writer.transport.abort()
    expect(grown < 64, f"{grown} MiB more while it did not read")
    return f"ended after {seconds:.0f} s, {grown} MiB more"


@case(
    13,
    "disconnect while queued, in prefill, in decode",
    "aborted within one step; free blocks as before",
    "--max-num-seqs",
    "4",
)
async def disconnects(site: Site) -> str:
    stream = {"model": site.base, "max_tokens": 800, "ignore_eos": True, "stream": True}
    async with connections(site, 12) as opened:
        for at, (_, writer) in enumerate(opened):
            writer.write(site.posted(stream | {"prompt": "word " * (1200 if at % 2 else 5)}))
        await asyncio.sleep(0.4)
    began = time.monotonic()
    await site.until(site.idle, "the engine to be idle", 10)
    return f"12 gone, idle after {time.monotonic() - began:.1f} s"


@case(
    48,
    "a 300 MiB header; 400,000 pipelined requests; 1,500 dribbling connections",
    "431, closed; timeouts",
    limit_s=240,
)
async def floods(site: Site) -> str:
    reader, writer = await site.connect()
    sent = 0
    with contextlib.suppress(ConnectionError):
        writer.write(site.head("GET /v1/models") + b"x: ")
        while sent < 300 * _MIB and not reader.at_eof():
            writer.write(b"y" * _MIB)
            await asyncio.wait_for(writer.drain(), 10)
            sent += _MIB
    _, got = await ends(reader, 20)
    writer.transport.abort()
    expect(sent < 8 * _MIB, f"{sent // _MIB} MiB of a header were taken")
    seen = [f"header refused after {sent // _MIB} MiB: {got[9:12].decode()}"]
    reader, writer = await site.connect()
    one = site.head("GET /health/live") + b"\r\n"
    with contextlib.suppress(ConnectionError, TimeoutError):
        for _ in range(400):
            writer.write(one * 1000)
            await asyncio.wait_for(writer.drain(), 5)
    writer.transport.abort()
    async with connections(site, 1500) as opened:
        for _ in range(20):
            for _, each in opened:
                each.write(b"G")
            await asyncio.sleep(1)
        left = await _still_open([each for each, _ in opened])
    expect(left == 0, f"{left} of {len(opened)} dribbling connections are open after 20 s")
    expect(await site.ready(), "not ready afterwards")
    return "; ".join(
        [*seen, "pipelining survived", f"0 of {len(opened)} dribbling connections open after 20 s"]
    )


@case(50, "cross-site form or text/plain POST; foreign Host", "415, 403, 421")
async def browser_pages(site: Site) -> str:
    await site.upload("victim", site.adapter_files())
    form = {"content-type": "text/plain", "origin": "http://evil.example", "sec-fetch-site": "cross-site"}
    tries = {
        "text/plain": await site.http.post(
            "/v1/unload_lora_adapter",
            content=b'{"lora_name": "victim"}',
            headers={"content-type": "text/plain"},
        ),
        "foreign page": await site.http.post(
            "/v1/unload_lora_adapter", content=b'{"lora_name": "victim"}', headers=form
        ),
        "foreign DELETE": await site.http.delete(
            "/v1/adapters/victim", headers={"origin": "http://evil.example"}
        ),
        "foreign Host": await site.http.get("/v1/models", headers={"host": "evil.example"}),
    }
    seen = ", ".join(f"{name} {answer.status_code}" for name, answer in tries.items())
    expect([a.status_code for a in tries.values()] in ([415, 415, 403, 421], [415, 403, 403, 421]), seen)
    there = (await site.http.get("/v1/adapters/victim")).status_code
    expect(there == 200, f"{seen}; the adapter is gone")
    await site.http.delete("/v1/adapters/victim")
    return seen


@case(
    51, "n=64, logprobs=20, 1,500 tokens, not streamed", "refused by a cap, or encoded in pieces", limit_s=600
)
async def large_answer(site: Site) -> str:
    answer = await site.http.post(
        "/v1/completions",
        json={
            "model": site.base,
            "prompt": "x",
            "n": 64,
            "max_tokens": 1500,
            "ignore_eos": True,
            "logprobs": 20,
            "temperature": 1,
        },
        timeout=550,
    )
    expect(answer.status_code in (200, 400), answer.text[:200])
    return f"{answer.status_code}, {len(answer.content) // 2**10} KiB"
