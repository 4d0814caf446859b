"""Who waits for outputs is woken in turns, for all that has come; nothing is lost where the engine ends."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from itertools import pairwise

import pytest

from server.border.open_calls import _WOKEN_AT_ONCE, OpenCalls
from server.errors import EngineDied
from server.messages import FinishReason, TokenOutput


def output(request_id: str, finish_reason: FinishReason | None = None) -> TokenOutput:
    return TokenOutput(request_id, [1], finish_reason)


async def test_a_step_that_ends_hundreds_is_handed_on_in_turns() -> None:
    calls, names = OpenCalls(), [f"r{at}" for at in range(5 * _WOKEN_AT_ONCE)]
    ended: list[str] = []

    async def follow(name: str) -> None:
        with calls.stream([name]) as stream:
            await stream.take()
            ended.append(name)

    followers = [asyncio.create_task(follow(name)) for name in names]
    await asyncio.sleep(0)
    calls.push([output(name, "stop") for name in names])
    counts = [0]
    while len(ended) < len(names):
        await asyncio.sleep(0)
        counts.append(len(ended))
    assert max(b - a for a, b in pairwise(counts)) <= _WOKEN_AT_ONCE
    assert ended == names
    await asyncio.gather(*followers)


async def test_who_waits_for_its_turn_is_woken_once_for_all_that_came() -> None:
    calls, names, taken = OpenCalls(), [f"r{at}" for at in range(2 * _WOKEN_AT_ONCE)], list[int]()

    async def follow(name: str) -> None:
        with calls.stream([name]) as stream:
            while outputs := await stream.take():
                taken.append(len(outputs))

    followers = [asyncio.create_task(follow(name)) for name in names]
    await asyncio.sleep(0)
    for reason in (None, None, None, "stop"):
        calls.push([output(name, reason) for name in names])
    await asyncio.gather(*followers)
    assert taken == [4] * len(names)


async def test_what_came_before_the_engine_ended_is_still_read() -> None:
    calls, names = OpenCalls(), [f"r{at}" for at in range(3 * _WOKEN_AT_ONCE)]
    with ExitStack() as stack:
        streams = [stack.enter_context(calls.stream([name])) for name in names]
        calls.push([output(name, "stop" if at % 2 else None) for at, name in enumerate(names)])
        calls.fail(lambda: EngineDied("gone"))
        for at, stream in enumerate(streams):
            assert len(await stream.take()) == 1
            if at % 2:
                assert await stream.take() == []
            else:
                with pytest.raises(EngineDied):
                    await stream.take()
