"""Requests that come at once begin in turns."""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import pairwise

from server.turns import _AT_ONCE, Turns


async def test_a_few_in_each_turn_and_in_order() -> None:
    turns, begun = Turns(), []
    for at in range(3 * _AT_ONCE + 1):
        turns.enter(partial(begun.append, at))
    counts = [len(begun)]
    while len(begun) <= 3 * _AT_ONCE:
        await asyncio.sleep(0)
        counts.append(len(begun))
    assert counts[0] == _AT_ONCE
    assert max(b - a for a, b in pairwise(counts)) <= _AT_ONCE
    assert begun == sorted(begun)


async def test_a_probe_does_not_wait() -> None:
    turns, begun = Turns(), []
    for at in range(100):
        turns.enter(partial(begun.append, at))
    turns.enter(partial(begun.append, -1), at_once=True)
    assert begun[-1] == -1


async def test_too_many_probes_wait_too() -> None:
    turns, begun = Turns(), []
    for at in range(100):
        turns.enter(partial(begun.append, at), at_once=True)
    assert len(begun) == 2 * _AT_ONCE


async def test_those_who_go_on_take_turns_too_and_some_may_leave() -> None:
    turns, gone_on = Turns(), []

    async def go_on(at: int) -> None:
        await turns.turn()
        gone_on.append(at)

    waiting = [asyncio.create_task(go_on(at)) for at in range(3 * _AT_ONCE + 1)]
    await asyncio.sleep(0)
    waiting[-2].cancel()
    counts = [0]
    while len(gone_on) < len(waiting) - 1:
        await asyncio.sleep(0)
        counts.append(len(gone_on))
    assert max(b - a for a, b in pairwise(counts)) <= _AT_ONCE
    assert gone_on == [at for at in range(len(waiting)) if at != len(waiting) - 2]


async def test_it_is_open_again_after_a_rest() -> None:
    turns, begun = Turns(), []
    for _ in range(3):
        for at in range(_AT_ONCE):
            turns.enter(partial(begun.append, at))
        assert len(begun) % _AT_ONCE == 0
        for _ in range(4):
            await asyncio.sleep(0)
    assert len(begun) == 3 * _AT_ONCE
