"""Mixed traffic for minutes, as a case: every token compared with the answer of a quiet server.

Clients ask for adapters of the folder and for names whose weights change under them, streamed or not, greedy
or with a seed, and some go away in the middle. In float32 an answer does not depend on what else is in the
batch, so the one that the same weights gave alone is right. An answer says which version it is of.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import httpx

from load_tests.drills.case import Case, expect
from load_tests.drills.cases.adapters import scaled
from load_tests.drills.site import Site

_FLAGS = ("--dtype", "float32", "--arena-bytes", "16MiB", "--max-num-seqs", "16")
_CLIENTS = 12
_MOVING = ("moving-0", "moving-1", "moving-2")  # names whose weights change
_PROMPTS = ("Anna saw two red apples =>\n", "list the towns", "x", "3 1 2 =>\n", "the old sailor " * 6)
_KINDS: tuple[dict[str, Any], ...] = ({"temperature": 0}, {"temperature": 0.8, "seed": 11})
_TOKENS = 32
_MOST_GROWN_MIB = 96
_SHOWN = 3

Key = tuple[str, int, int]  # digest of the weights ("" of the base model), prompt, kind


def soak_case(minutes: float, seed: int, prompts: int = len(_PROMPTS)) -> Case:
    """`prompts`: how many of them are asked."""
    return Case(
        103,
        f"{minutes:g} minutes of mixed traffic, adapters changing, clients going away (seed {seed})",
        "every token as from a quiet server; memory flat",
        partial(_soak, minutes, seed, prompts),
        _FLAGS,
        limit_s=600 + 60 * minutes,
    )


@dataclass
class _Run:
    """What was seen so far. `right`: tokens by weights, prompt and kind."""

    site: Site
    random: Random
    names: list[str]
    contents: list[dict[str, bytes]]
    prompts: int
    over_at: float = 0.0
    right: dict[Key, list[int]] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return time.monotonic() > self.over_at or len(self.wrong) > 100

    def judge(self, answer: _Answer, prompt: int, kind: int) -> str:
        """What the answer is: `right`, or the reason why it is none."""
        if answer.error is not None:
            return answer.error
        expected = self.right[answer.digest, prompt, kind]
        if answer.tokens == expected:
            return "right"
        self.wrong.append(
            f"prompt {prompt}, kind {kind}, {answer.digest[:8]}: {answer.tokens}, not {expected}"
        )
        return "wrong"


@dataclass
class _Answer:
    """`error`: why there is none."""

    digest: str = ""
    tokens: list[int] = field(default_factory=list)
    error: str | None = None

    def take(self, piece: dict[str, Any]) -> None:
        self.digest = piece.get("adapter_version") or self.digest
        if "error" in piece:
            self.error = str(piece["error"]["code"])
        for choice in piece.get("choices", ()):
            self.tokens += choice["token_ids"] or ()


async def _soak(minutes: float, seed: int, prompts: int, site: Site) -> str:
    names = [model["id"] for model in (await site.http.get("/v1/models")).json()["data"]]
    contents = [scaled(site.adapter_files(), factor) for factor in (1.0, -1.0, 0.5, 2.0)]
    run = _Run(site, Random(seed), names, contents, prompts)
    await _learn(run)
    memory = (await site.books()).memory_mib
    run.over_at = time.monotonic() + 60 * minutes
    await asyncio.gather(*(_client(run) for _ in range(_CLIENTS)), *(_mover(run, name) for name in _MOVING))
    grown = (await site.books()).memory_mib - memory
    for name in _MOVING:
        await site.http.delete(f"/v1/adapters/{name}")
    counts = ", ".join(f"{count} {outcome}" for outcome, count in run.outcomes.most_common())
    seen = f"{counts}; {grown} MiB more"
    expect(not run.wrong, f"{seen}; {len(run.wrong)} wrong, as {run.wrong[:_SHOWN]}")
    expect(run.outcomes["right"] > 0 and grown < _MOST_GROWN_MIB, seen)
    return seen


async def _learn(run: _Run) -> None:
    """Every answer that there is, one at a time; the moving names are there afterwards."""
    for content in run.contents:
        await run.site.upload(_MOVING[0], content, "PUT")
        await _learn_of(run, _MOVING[0])
    for name in run.names:
        await _learn_of(run, name)
    for name in _MOVING[1:]:
        await run.site.upload(name, run.contents[0], "PUT")


async def _learn_of(run: _Run, name: str) -> None:
    for prompt in range(run.prompts):
        for kind in range(len(_KINDS)):
            answer = await _whole(run.site, _body(name, prompt, kind))
            expect(answer.error is None and answer.tokens, f"{name}, alone: {answer.error}")
            run.right[answer.digest, prompt, kind] = answer.tokens


def _body(name: str, prompt: int, kind: int) -> dict[str, Any]:
    asked = {"model": name, "prompt": _PROMPTS[prompt], "max_tokens": _TOKENS, "return_token_ids": True}
    return asked | _KINDS[kind]


async def _whole(site: Site, body: dict[str, Any]) -> _Answer:
    answer = _Answer()
    answer.take((await site.http.post("/v1/completions", json=body)).json())
    return answer


async def _streamed(site: Site, body: dict[str, Any], most: int | None = None) -> _Answer:
    """`most`: events to read before going away."""
    answer, events, ended = _Answer(), 0, False
    async with site.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        if response.status_code != 200:
            answer.take(json.loads(await response.aread()))
            return answer
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                answer.take(json.loads(line.removeprefix("data: ")))
                events += 1
            if events == most:
                return _Answer(error="left")
    return answer if ended or answer.error else _Answer(error="a stream without its end")


async def _client(run: _Run) -> None:
    while not run.over:
        name = run.random.choice([*run.names, *_MOVING * 2])
        prompt, kind = run.random.randrange(run.prompts), run.random.randrange(len(_KINDS))
        body = _body(name, prompt, kind)
        way = run.random.random()
        try:
            if way < 0.4:
                answer = await _whole(run.site, body)
            else:
                answer = await _streamed(run.site, body, run.random.randrange(1, 9) if way > 0.85 else None)
        except httpx.HTTPError as error:
            answer = _Answer(error=f"{type(error).__name__}: {error}")
        outcome = run.judge(answer, prompt, kind)
        run.outcomes[outcome] += 1
        if outcome not in ("right", "wrong", "left", "model_not_found"):
            run.wrong.append(f"{name}: {outcome}")


async def _mover(run: _Run, name: str) -> None:
    """Gives the name other weights, and now and then takes it away for a moment."""
    while not run.over:
        await asyncio.sleep(run.random.uniform(0.1, 1.0))
        if run.random.random() < 0.3:
            await run.site.http.delete(f"/v1/adapters/{name}")
        answer = await run.site.upload(name, run.random.choice(run.contents), "PUT")
        run.outcomes["uploads"] += 1
        if answer.status_code not in (200, 201):
            run.wrong.append(f"an upload of {name}: {answer.status_code} {answer.text[:200]}")
