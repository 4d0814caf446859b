"""More than there is room for."""

from __future__ import annotations

import asyncio
import time

import httpx

from load_tests.drills.case import case, expect
from load_tests.drills.cases.adapters import scaled
from load_tests.drills.cases.requests import refused
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


@case(14, "10x overload, for a while", "429 or 503 with Retry-After; recovers", limit_s=300)
async def overload(site: Site) -> str:
    statuses: dict[int, int] = {}
    end = time.monotonic() + 15

    async def client(at: int) -> None:
        while time.monotonic() < end:
            answer = await site.complete(prompt=[5 + at % 300], max_tokens=32, ignore_eos=True)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            if answer.status_code != 200:
                await asyncio.sleep(min(float(answer.headers["retry-after"]), 1.0))

    await asyncio.gather(*(client(at) for at in range(640)))
    expect(set(statuses) <= {200, 429, 503}, str(statuses))
    began = time.monotonic()
    expect((await site.complete()).status_code == 200, "no answer afterwards")
    return f"{statuses}; then an answer in {time.monotonic() - began:.2f} s"


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


@case(47, "pins fill the arena", "503; a share for pins", "--arena-bytes", "1MiB")
async def pins_fill_the_arena(site: Site) -> str:
    names = [model["id"] for model in (await site.http.get("/v1/models")).json()["data"]][1:]
    statuses = [
        (await site.http.post(f"/v1/adapters/{name}/load", json={"pin": True})).status_code for name in names
    ]
    expect(set(statuses) <= {200, 409, 503} and set(statuses) != {200}, str(statuses))
    answers = await asyncio.wait_for(asyncio.gather(*(site.complete(name) for name in names)), 60)
    seen = [answer.status_code for answer in answers]
    expect(set(seen) <= {200, 503}, str(seen))
    for name in names:
        await site.http.post(f"/v1/adapters/{name}/unload")
    return f"pins {statuses}; requests {seen}"


@case(33, "out of accelerator memory on load", "503; clean; serving goes on", "--arena-bytes", "256KiB")
async def no_room_on_load(site: Site) -> str:
    names = [model["id"] for model in (await site.http.get("/v1/models")).json()["data"]][1:]
    answers = [await site.http.post(f"/v1/adapters/{name}/load") for name in names]
    statuses = sorted({answer.status_code for answer in answers})
    expect(set(statuses) <= {200, 400, 503}, str(statuses))
    expect((await site.complete()).status_code == 200, "the base model does not answer")
    return f"loads {statuses}; the base model answers"


@case(40, "100,000 adapter names come and go", "/metrics and memory stay flat", limit_s=600)
async def many_names(site: Site) -> str:
    async def size() -> int:
        return len((await site.http.get("/metrics")).content)

    before = await size()
    async with httpx.AsyncClient(base_url=site.server.url, timeout=60) as http:
        for start in range(0, 20_000, 100):
            asked = [
                http.post("/v1/completions", json={"model": f"name-{start + k}", "prompt": PROMPT})
                for k in range(100)
            ]
            for answer in await asyncio.gather(*asked):
                refused(answer, 404)
    files = site.adapter_files()
    for k in range(100):
        await site.upload(f"passing-{k}", scaled(files, 1 + k / 1000))
        await site.complete(f"passing-{k}", max_tokens=1)
        await site.http.delete(f"/v1/adapters/passing-{k}")
    after = await size()
    expect(after < before + 4096, f"/metrics {before} -> {after} bytes")
    return f"20,000 unknown names and 100 adapters: /metrics {before} -> {after} bytes"


@case(58, "6,000 adapters listed", "pages; /metrics under 20 kB", limit_s=900)
async def many_adapters(site: Site) -> str:
    files = site.adapter_files()
    for start in range(0, 1500, 50):
        uploads = [site.upload(f"many-{start + k}", files) for k in range(50)]
        for answer in await asyncio.gather(*uploads):
            expect(answer.status_code == 201, answer.text[:100])
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
    for start in range(1500):
        await site.http.delete(f"/v1/adapters/many-{start}")
    expect(pages >= 3 and size < 20_000, f"{pages} pages, /metrics {size} bytes")
    return f"1,500 adapters in {pages} pages; /metrics {size} bytes"
