"""More than there is room for."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Iterable

import httpx

from load_tests.drills.case import case, expect
from load_tests.drills.cases.adapters import scaled
from load_tests.drills.cases.hostile import of_rank
from load_tests.drills.site import PROMPT, Site


@case(
    46,
    "2,000 requests at once",
    "bounded queue: 503 with Retry-After at once; admitted ones are answered",
    limit_s=400,
)
async def all_at_once(site: Site) -> str:
    async def one(at: int) -> tuple[httpx.Response, float]:
        began = time.monotonic()
        answer = await site.complete(prompt=[5 + at % 100, at % 500], max_tokens=16, ignore_eos=True)
        return answer, time.monotonic() - began

    answers = await asyncio.gather(*(one(at) for at in range(2000)))
    served = [seconds for answer, seconds in answers if answer.status_code == 200]
    shed = [(answer, seconds) for answer, seconds in answers if answer.status_code in (429, 503)]
    expect(len(served) + len(shed) == 2000, str({answer.status_code for answer, _ in answers}))
    expect(shed and all("retry-after" in answer.headers for answer, _ in shed), f"{len(shed)} shed")
    again = await site.complete()
    expect(again.status_code == 200, f"afterwards {again.status_code}")
    return (
        f"{len(served)} served, the last after {max(served):.1f} s; {len(shed)} told, the last after "
        f"{max(seconds for _, seconds in shed):.1f} s"
    )


@case(
    14,
    "10x overload, for a while",
    "429 or 503 with Retry-After; admitted latency bounded; recovers",
    limit_s=300,
)
async def overload(site: Site) -> str:
    statuses: dict[int, int] = {}
    longest, end = 0.0, time.monotonic() + 15

    async def client(at: int) -> None:
        nonlocal longest
        while (asked := time.monotonic()) < end:
            answer = await site.complete(prompt=[5 + at % 300], max_tokens=32, ignore_eos=True)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            if answer.status_code == 200:
                longest = max(longest, time.monotonic() - asked)
            else:
                await asyncio.sleep(min(float(answer.headers["retry-after"]), 1.0))

    await asyncio.gather(*(client(at) for at in range(640)))
    expect(set(statuses) in ({200, 429}, {200, 503}), str(statuses))
    expect(longest < 60, f"an admitted one took {longest:.0f} s")
    began = time.monotonic()
    expect((await site.complete()).status_code == 200, "no answer afterwards")
    return (
        f"{statuses}, admitted ones in up to {longest:.1f} s; then an answer in "
        f"{time.monotonic() - began:.2f} s"
    )


@case(15, "deadline passes while queued", "a clear timeout error, never silence", "--max-num-seqs", "1")
async def deadline_in_the_queue(site: Site) -> str:
    busy = asyncio.create_task(site.complete(max_tokens=1500, ignore_eos=True))
    await asyncio.sleep(0.3)
    began = time.monotonic()
    answer = await site.complete(timeout=1.0)
    seconds = time.monotonic() - began
    busy.cancel()
    expect(answer.status_code in (408, 504) and seconds < 3, f"{answer.status_code} after {seconds:.1f} s")
    return f"{answer.status_code} {answer.json()['error']['code']} after {seconds:.1f} s"


@case(
    47, "pins fill the arena", "503 or 409 beyond their share; nobody waits for ever", "--arena-bytes", "2MiB"
)
async def pins_fill_the_arena(site: Site) -> str:
    names = [model["id"] for model in (await site.http.get("/v1/models")).json()["data"]][1:]
    try:
        pins = [await site.http.post(f"/v1/adapters/{name}/load", json={"pin": True}) for name in names]
        answers = await asyncio.wait_for(asyncio.gather(*(site.complete(name) for name in names)), 60)
    finally:
        for name in names:
            await site.http.post(f"/v1/adapters/{name}/unload")
    statuses, seen = ([each.status_code for each in some] for some in (pins, answers))
    expect({200} < set(statuses) <= {200, 409, 503}, f"pins {statuses}")
    expect({200} <= set(seen) <= {200, 503}, f"requests {seen}")
    return f"pins {statuses}; requests {seen}"


@case(
    33,
    "out of accelerator memory on load",
    "503; clean; serving goes on",
    "--arena-bytes",
    "2MiB",
    limit_s=300,
)
async def no_room_on_load(site: Site) -> str:
    names = [model["id"] for model in (await site.http.get("/v1/models")).json()["data"]][1:]
    in_use = asyncio.gather(*(site.complete(name, max_tokens=200, ignore_eos=True) for name in names))
    statuses: list[int] = []
    while 503 not in statuses and not in_use.done():
        statuses += [(await site.http.post(f"/v1/adapters/{name}/load")).status_code for name in names]
    served = {answer.status_code for answer in await in_use}
    expect(503 in statuses and set(statuses) <= {200, 503}, str(statuses))
    expect(served == {200}, f"those that use the arena: {served}")
    later = [(await site.http.post(f"/v1/adapters/{name}/load")).status_code for name in names]
    expect(set(later) == {200}, f"loads afterwards: {later}")
    return f"loads {sorted(set(statuses))} while {len(names)} adapters are in use, which are served; then 200"


_PASSING = 100_000
_AT_A_TIME = 16  # requests that may wait on a connection


async def _ask_unknown(site: Site) -> int:
    """For as many models that there never were, many on each connection: how many were not found."""
    reader, writer = await site.connect()
    missed = 0
    for start in range(0, _PASSING, _AT_A_TIME):
        names = (f"name-{start + k}" for k in range(_AT_A_TIME))
        writer.write(b"".join(site.posted({"model": name, "prompt": PROMPT}) for name in names))
        for _ in range(_AT_A_TIME):
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            body = await reader.readexactly(int(length.partition(b":")[2]))
            missed += b" 404 " in head[:20] and b"model_not_found" in body
    writer.close()
    return missed


@case(40, "100,000 adapter names come and go", "/metrics and memory stay flat", limit_s=900)
async def many_names(site: Site) -> str:
    async def size() -> int:
        return len((await site.http.get("/metrics")).content)

    before, memory = await size(), (await site.books()).memory_mib
    missed = await _ask_unknown(site)
    expect(missed == _PASSING, f"{missed} of {_PASSING} were 404")
    files = site.adapter_files()
    for k in range(200):
        name = f"passing-{k}"
        expect((await site.upload(name, scaled(files, 1 + k / 1000))).status_code == 201, "no upload")
        expect((await site.complete(name, max_tokens=1)).status_code == 200, "no answer")
        await site.http.delete(f"/v1/adapters/{name}")
    after, grown = await size(), (await site.books()).memory_mib - memory
    seen = f"{_PASSING:,} unknown names, 200 adapters: /metrics {before} -> {after} bytes, {grown} MiB more"
    expect(after < before + 4096 and grown < 64, seen)
    return seen


_LISTED, _RESIDENT = 6000, 3000


async def _some_at_a_time(calls: Iterable[Awaitable[httpx.Response]], status: int) -> None:
    """All answers have this status."""
    waiting = iter(calls)
    while some := list(itertools.islice(waiting, 50)):
        for answer in await asyncio.gather(*some):
            expect(answer.status_code == status, f"{answer.status_code} {answer.text[:100]}")


@case(
    58,
    "6,000 adapters listed; 3,000 resident scraped",
    "pages; /metrics under 20 kB",
    "--arena-bytes",
    "256MiB",
    limit_s=1800,
)
async def many_adapters(site: Site) -> str:
    names = [f"many-{k}" for k in range(_LISTED)]
    await _some_at_a_time((site.upload(name, of_rank(site, 1, k)) for k, name in enumerate(names)), 201)
    await _some_at_a_time((site.http.post(f"/v1/adapters/{name}/load") for name in names[:_RESIDENT]), 200)
    resident = (await site.metrics())["chorus_arena_adapters"]
    expect(resident >= _RESIDENT, f"{resident:.0f} are resident")
    pages, after = 0, ""
    while True:
        page = (
            await site.http.get("/v1/adapters", params={"limit": 500} | ({"after": after} if after else {}))
        ).json()
        pages += 1
        if not page.get("has_more"):
            break
        after = page["last_id"]
    await site.http.get("/v1/models")
    size = len((await site.http.get("/metrics")).content)
    await _some_at_a_time((site.http.delete(f"/v1/adapters/{name}") for name in names), 200)
    seen = f"{_LISTED:,} adapters in {pages} pages; with {resident:.0f} resident /metrics {size} bytes"
    expect(pages >= _LISTED // 500 and size < 20_000, seen)
    return seen
