"""The bounded queue: what is refused, when, and that places come back."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from server.api.waiting_room import Ticket, WaitingRoom
from server.errors import QueueFull, QueueShareFull
from server.messages import ErrorCode
from tests.api.face_site import Site, drained, events, eventually, open_site
from tests.api.fake_engine import FakeEngine


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_does_not_fit_is_refused_and_places_come_back() -> None:
    room = WaitingRoom(4)
    with room.enter("", 3) as ticket:
        room.check("")
        with pytest.raises(QueueFull, match="server lets: 4"), room.enter("", 2):
            pass
        ticket.started()
        with room.enter("", 2):
            assert room.waiting == 4
        assert room.waiting == 2
    assert room.waiting == 0


def test_a_request_larger_than_the_queue_is_let_in_when_nobody_waits() -> None:
    room = WaitingRoom(4)
    with room.enter("", 100), pytest.raises(QueueFull):
        room.check("")
    assert room.waiting == 0


def test_one_tenant_cannot_fill_it_and_each_further_one_finds_places() -> None:
    room = WaitingRoom(100)
    held = dict.fromkeys("abc", 0)
    with ExitStack() as places:
        for tenant in held:
            for _ in range(100):
                with suppress(QueueShareFull):
                    places.enter_context(room.enter(tenant, 1))
                    held[tenant] += 1
    assert held == {"a": 80, "b": 16, "c": 3}


def test_retry_after_follows_the_rate_of_starts() -> None:
    clock = Clock()
    room = WaitingRoom(1000, clock)
    assert room.retry_after_s == 1
    clock.now = 5000.0  # in which nobody came
    with room.enter("", 100) as ticket:
        assert room.retry_after_s == 2
        for _ in range(50):
            clock.now += 0.5
            ticket.started()
        assert room.retry_after_s == pytest.approx(50 * 0.5, abs=1)
        clock.now += 1000.0  # nothing starts any more
        assert room.retry_after_s == 60


def test_a_ticket_gives_nothing_back_twice() -> None:
    room = WaitingRoom(9)
    ticket: Ticket
    with room.enter("t", 1) as ticket:
        ticket.started()
        ticket.started()
    assert room.waiting == 0
    assert not room._by_tenant


async def test_the_rest_is_told_at_once(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.pause_after = 0
    async with open_site(tmp_path, engine, max_waiting_requests=5) as site:
        running = [asyncio.create_task(site.complete()) for _ in range(5)]
        await eventually(lambda: len(engine.requests) == 5)
        refused = await asyncio.gather(*(site.complete() for _ in range(20)))
        assert {answer.status_code for answer in refused} == {503}
        error = refused[0].json()["error"]
        assert (error["code"], error["type"]) == ("queue_full", "server_error")
        assert int(refused[0].headers["retry-after"]) >= 1
        assert len(engine.requests) == 5, "a refusal costs the engine nothing"
        lines = (await site.client.get("/metrics")).text.splitlines()
        assert "chorus_queue_sequences 5.0" in lines
        assert "chorus_queue_limit 5.0" in lines
        assert 'chorus_refused_total{reason="queue_full"} 20.0' in lines
        engine.resume.set()
        assert {answer.status_code for answer in await asyncio.gather(*running)} == {200}
        assert site.face.waiting_room.waiting == 0
        assert (await site.complete()).status_code == 200
        await drained(site)


async def test_choices_count_each_and_who_has_a_token_no_more(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.pause_after, engine.tokens = 1, [7, 7, 7]
    async with open_site(tmp_path, engine, max_waiting_requests=5) as site:
        running = asyncio.create_task(site.complete(n=2, prompt=["a", "b"]))
        await eventually(lambda: len(engine.requests) == 4 and not site.face.waiting_room.waiting)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await drained(site)
        assert site.face.waiting_room.waiting == 0


@pytest.mark.parametrize("error", [None, ErrorCode.INTERNAL])
async def test_places_come_back_however_it_ends(tmp_path: Path, error: ErrorCode | None) -> None:
    engine = FakeEngine()
    engine.error = error
    async with open_site(tmp_path, engine) as site:
        await site.complete(n=3)
        await site.complete(model="nobody")
        await site.complete(stream=True)
        assert site.face.waiting_room.waiting == 0


# -- deadlines and classes


@pytest.fixture
async def site(tmp_path: Path):
    async with open_site(tmp_path, request_timeout_s=50.0) as site:
        yield site


async def test_priority_and_time_reach_the_engine(site: Site) -> None:
    await site.complete()
    await site.complete(priority=3, timeout=2.5)
    await site.chat(priority=9, timeout=1e4)
    sent = [(request.priority, request.timeout_s, request.tenant) for request in site.engine.requests]
    assert sent == [(0, 50.0, ""), (3, 2.5, ""), (9, 50.0, "")]


async def test_a_time_that_is_over_is_said(site: Site) -> None:
    site.engine.error = ErrorCode.DEADLINE_EXCEEDED
    answer = await site.complete(timeout=1)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (504, "deadline_exceeded", "timeout")
    assert answer.headers["x-should-retry"] == "false"


async def test_a_time_that_is_over_in_a_stream_is_an_event(site: Site) -> None:
    site.say("hello there")
    site.engine.error, site.engine.error_after = ErrorCode.DEADLINE_EXCEEDED, 2
    answer = await site.complete(stream=True)
    assert answer.status_code == 200
    *chunks, last = events(answer.text)
    assert chunks
    assert last["error"]["code"] == "deadline_exceeded"
