"""Requests and files at random, as cases: whatever comes in, no error is the server's and nothing stays."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterable
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import httpx

from load_tests.drills.case import Case, expect
from load_tests.drills.mutations import Files, mutated_archive, mutated_files
from load_tests.drills.site import Site

if TYPE_CHECKING:
    from load_tests.drills.bodies import Asked, Bodies  # imports Schemathesis

_FLAGS = ("--api-key", "the-key-of-the-fuzz", "--max-model-len", "128")
_AT_A_TIME = 8
_COPIES = ("fuzzed-0", "fuzzed-1", "fuzzed-2")  # adapters that the requests may delete
_SHOWN = 5


def fuzz_cases(posts: int, files: int, seed: int) -> list[Case]:
    """`posts` bodies over the POST routes, and so many mutated uploads."""
    told = f"seed {seed}"
    return [
        Case(
            101,
            f"{posts:,} random bodies on every POST route, and other requests ({told})",
            "no 5xx but 503; the same answers afterwards",
            partial(_bodies, posts, seed),
            _FLAGS,
            limit_s=60 + posts,
        ),
        Case(
            102,
            f"{files:,} mutated safetensors, configs and archives uploaded ({told})",
            "4xx, or 201 and it can be used; nothing left",
            partial(_files, files, seed),
            _FLAGS,
            limit_s=60 + 2 * files,
        ),
    ]


class _Seen:
    """Statuses, and what should not have been."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []

    def __str__(self) -> str:
        counts = ", ".join(f"{count} times {status}" for status, count in sorted(self.statuses.items()))
        return f"{len(self.wrong)} wrong, as {self.wrong[:_SHOWN]}" if self.wrong else counts


async def _bodies(posts: int, seed: int, site: Site) -> str:
    from load_tests.drills.bodies import Bodies

    document = (await site.http.get("/openapi.json")).json()
    names = [site.base, *_COPIES, f"{_COPIES[0]}@1"]
    seen, before = _Seen(), await _answer(site)
    async for some in _in_a_thread(Bodies(document, names, seed), posts):
        await _copies(site)
        await _in_turns([_ask(site, asked, seen) for asked in some])
    for name in _COPIES:
        await site.http.delete(f"/v1/adapters/{name}")
    _no_trace(site, seen)
    expect(await _answer(site) == before, "another answer than before")
    return str(seen)


async def _in_a_thread(bodies: Bodies, posts: int) -> AsyncIterator[list[Asked]]:
    made = bodies.make(posts)
    while some := await asyncio.to_thread(next, made, None):
        yield some


async def _answer(site: Site) -> str:
    answer = await site.complete(max_tokens=32, ignore_eos=True)
    expect(answer.status_code == 200, f"a sound request: {answer.status_code} {answer.text[:200]}")
    return str(answer.json()["choices"][0]["text"])


async def _copies(site: Site) -> None:
    """They are there, again."""
    for name in _COPIES:
        answer = await site.upload(name, site.adapter_files(), "PUT")
        expect(answer.status_code in (200, 201), f"a sound upload: {answer.status_code} {answer.text[:200]}")


async def _in_turns(calls: Iterable[Awaitable[None]]) -> None:
    turns = asyncio.Semaphore(_AT_A_TIME)

    async def one(call: Awaitable[None]) -> None:
        async with turns:
            await call

    await asyncio.gather(*map(one, calls))


async def _ask(site: Site, asked: Asked, seen: _Seen) -> None:
    try:
        request = site.http.build_request(
            asked.method, asked.path, headers=asked.headers, content=asked.content
        )
        answer = await site.http.send(request)
    except (httpx.InvalidURL, ValueError):
        return  # no client can send it
    except httpx.HTTPError as error:
        seen.wrong.append(f"{asked}: {type(error).__name__} {error}")
        return
    seen.statuses[answer.status_code] += 1
    if answer.status_code >= 500 and answer.status_code != 503:
        seen.wrong.append(f"{asked}: {answer.status_code} {answer.text[:200]}")


def _no_trace(site: Site, seen: _Seen) -> None:
    """Neither a wrong answer nor a traceback in the server's log."""
    log = site.server.log_text()
    at = log.find("Traceback")
    expect(not seen.wrong, str(seen))
    expect(at < 0, f"in the log: {log[at : at + 2000]}")


async def _files(count: int, seed: int, site: Site) -> str:
    seen, random = _Seen(), Random(seed)
    blobs = _blobs(site)
    sound = site.adapter_files()
    for start in range(0, count, 100):
        made = [_mutated(sound, random) for _ in range(min(100, count - start))]
        await _in_turns([_upload(site, f"mutated-{start + k}", files, seen) for k, files in enumerate(made)])
    _no_trace(site, seen)

    async def nothing_is_left() -> bool:
        return _blobs(site) == blobs

    await site.until(nothing_is_left, "the files of deleted adapters to go")
    return str(seen)


def _blobs(site: Site) -> set[str]:
    return {folder.name for folder in (site.data_dir / "adapters").glob("*/*")}


def _mutated(sound: Files, random: Random) -> Files:
    if random.random() < 0.5:
        return mutated_files(sound, random)
    name, content = mutated_archive(sound, random)
    return {name: content}


async def _upload(site: Site, name: str, files: Files, seen: _Seen) -> None:
    answer = await site.upload(name, files)
    seen.statuses[answer.status_code] += 1
    if answer.status_code == 201:
        await _used(site, name, seen)
    elif not 400 <= answer.status_code < 500:
        seen.wrong.append(f"{name}: {answer.status_code} {answer.text[:200]}")


async def _used(site: Site, name: str, seen: _Seen) -> None:
    """It answers, or says that its weights are too large; then it goes."""
    answer = await site.complete(name, max_tokens=2)
    if answer.status_code != 200 and "non_finite_logits" not in answer.text:
        seen.wrong.append(f"{name}, which was taken: {answer.status_code} {answer.text[:200]}")
    gone = await site.http.delete(f"/v1/adapters/{name}")
    if gone.status_code not in (200, 202):
        seen.wrong.append(f"{name}, to be deleted: {gone.status_code} {gone.text[:200]}")
