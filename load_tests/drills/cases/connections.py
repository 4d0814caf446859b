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
    asked = {"model": site.base, "prompt": "x", "n": 64, "max_tokens": 1900, "ignore_eos": True}
    before, told = (await site.books()).memory_mib, await _generated(site)
    reader, writer = await site.connect()
    writer.write(site.posted(asked | {"stream": True, "temperature": 1}))
    began = time.monotonic()
    head = await asyncio.wait_for(reader.readuntil(b"data: "), 30)
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # of the socket transport
    expect(b" 200 " in head[:20], f"no stream: {head[:80]!r}")
    await site.until(site.idle, "the engine to be idle", 280)
    seconds, tokens = time.monotonic() - began, await _generated(site) - told
    grown = (await site.books()).memory_mib - before
    writer.transport.abort()
    seen = f"ended after {seconds:.0f} s and {tokens:.0f} of {64 * 1900} tokens, {grown} MiB more"
    expect(tokens < 64 * 1900 and grown < 64, seen)
    return seen


async def _generated(site: Site) -> float:
    """Tokens since the start."""
    return (await site.metrics())["vllm:generation_tokens_total"]


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

        async def some_run_and_some_wait() -> bool:
            metrics = await site.metrics()
            return bool(metrics["vllm:num_requests_running"] and metrics["vllm:num_requests_waiting"])

        await site.until(some_run_and_some_wait, "some that run and some that wait", 20)
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
    sent, _ = await _pour(site, site.head("GET /v1/models") + b"x: ", b"y" * _MIB, 300)
    expect(sent < 8, f"{sent} MiB of a header were taken")
    _, answer = await _pour(site, site.head("GET /v1/models", "x: " + "y" * 40_960), b"\r\n", 1)
    expect(b" 431 " in answer[:20], f"a header of 40 KiB: {answer[:80]!r}")
    seen = f"header cut after {sent} MiB, of 40 KiB 431"
    taken, answers = await _pour(site, b"", (site.head("GET /v1/models") + b"\r\n") * 1000, 400)
    expect(taken < 400, "400,000 pipelined requests were taken")
    seen += f"; closed after {taken},000 pipelined requests and {answers.count(b' 200 OK')} answers"
    async with connections(site, 1500) as opened:
        for _ in range(20):
            for reader, writer in opened:
                if not reader.at_eof() and not writer.is_closing():
                    writer.write(b"G")
            await asyncio.sleep(1)
        left = await _still_open([each for each, _ in opened])
    expect(left == 0, f"{left} of {len(opened)} dribbling connections are open after 20 s")
    expect(await site.ready(), "not ready afterwards")
    return f"{seen}; 0 of {len(opened)} dribbling connections open after 20 s"


async def _pour(site: Site, head: bytes, piece: bytes, most: int) -> tuple[int, bytes]:
    """Sends `piece` after `head` until the server has enough: how many went out, and what it said."""
    reader, writer = await site.connect()
    answer = asyncio.create_task(ends(reader, 20))
    sent = 0
    writer.write(head)
    with contextlib.suppress(ConnectionError):
        while sent < most and not answer.done():
            writer.write(piece)
            await asyncio.wait_for(writer.drain(), 20)
            await asyncio.sleep(0)
            sent += 1
    _, got = await answer
    writer.transport.abort()
    return sent, got


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
    51,
    "n=64, logprobs=20, 1,500 tokens, never read; the same not streamed",
    "refused by a cap; cut at a bound; encoded in pieces",
    limit_s=900,
)
async def large_answers(site: Site) -> str:
    many = {"prompt": "x", "n": 64, "ignore_eos": True, "temperature": 1, "logprobs": 20}
    beyond = await site.complete(**many, max_tokens=1500)
    expect(beyond.status_code == 400, f"beyond the cap: {beyond.status_code}")
    fits = await site.complete(**many, max_tokens=None)
    expect(fits.status_code == 200, f"as many as fit: {fits.status_code} {fits.text[:200]}")
    unread = await _unread_logprobs(site)
    return f"beyond the cap 400, as many as fit {len(fits.content) // 2**10} KiB; {unread}"


async def _unread_logprobs(site: Site) -> str:
    """The same amount in streams that nobody reads: refused in one request, held within bounds in 64."""
    asked = {"model": site.base, "prompt": "x", "ignore_eos": True, "temperature": 1, "stream": True}
    asked |= {"logprobs": 20, "max_tokens": 1500}
    beyond = await site.complete(**asked, n=64)
    expect(beyond.status_code == 400, f"a stream beyond the cap: {beyond.status_code}")
    before, told = (await site.books()).memory_mib, await _generated(site)
    async with connections(site, 64) as opened:
        for _, writer in opened:
            writer.write(site.posted(asked))
        for reader, writer in opened:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
            expect(b" 200 " in head[:20], f"no stream: {head[:80]!r}")
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # of the socket transport
        most = 0

        async def over() -> bool:
            nonlocal most
            await asyncio.sleep(1)  # to count pages holds the processes up
            most = max(most, await asyncio.to_thread(site.memory_mib))
            return await site.idle()

        await site.until(over, "the engine to be idle", 600)
    tokens = await _generated(site) - told
    seen = f"64 unread streams: {tokens:.0f} of {64 * 1500} tokens, {most - before} MiB more at the most"
    expect(most - before < 64 * 8, seen)
    return seen
