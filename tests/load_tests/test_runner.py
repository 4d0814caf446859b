from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from load_tests.client import Record
from load_tests.runner import (
    RunResult,
    answer_key,
    answers_of,
    check_answers,
    read_answers,
    read_result,
    replay,
    run_load,
    write_answers,
    write_result,
)
from load_tests.trace import Lengths, TraceRequest, TraceSpec, adapter_names, generate
from tests.load_tests.fake_server import FakeServer, until


def make_trace(requests: int = 40, rate: float | None = None) -> list[TraceRequest]:
    spec = TraceSpec(
        requests=requests,
        adapters=adapter_names(5),
        base_share=0.2,
        rate=rate,
        prompt_tokens=Lengths.parse("uniform:2:6"),
        output_tokens=Lengths.parse("uniform:2:5"),
    )
    return generate(spec)


async def load(trace: list[TraceRequest], server: FakeServer, **options: Any) -> RunResult:
    return await run_load(trace, server.target(), label="t", console=Console(file=io.StringIO()), **options)


async def test_closed_loop_keeps_its_workers_busy_and_no_more(server: FakeServer) -> None:
    server.token_delay_s = 0.001
    result = await load(make_trace(), server, concurrency=4)
    assert result.flawless
    assert server.most_in_flight == 4
    assert result.mode == "closed loop, 4 workers"
    assert [record.id for record in result.records] == list(range(40))


async def test_open_loop_sends_at_the_arrival_times(server: FakeServer) -> None:
    trace = make_trace(30, rate=150.0)
    result = await load(trace, server)
    assert result.flawless
    assert [record.start_s for record in result.records] == [request.arrival_s for request in trace]
    assert all(record.sent_s >= record.start_s for record in result.records)


async def test_open_loop_does_not_wait_for_answers(server: FakeServer) -> None:
    server.hangs.update(["base", *adapter_names(5)])
    records: list[Record] = []
    replaying = asyncio.create_task(replay(make_trace(12, rate=2000.0), server.target(), records))
    await until(lambda: server.in_flight == 12)
    replaying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await replaying
    assert records == []


async def test_a_trace_replayed_asks_the_same(server: FakeServer) -> None:
    trace = make_trace()
    await load(trace, server, concurrency=1)
    first, server.bodies = server.bodies, []
    await load(trace, server, concurrency=1)
    assert server.bodies == first


async def test_failures_are_counted_not_fatal(server: FakeServer) -> None:
    server.refuses.add("adapter-000")
    server.breaks.add("adapter-001")
    trace = make_trace()
    result = await load(trace, server, concurrency=8)
    bad = {request.id for request in trace if request.adapter in ("adapter-000", "adapter-001")}
    assert {record.id for record in result.records if record.error} == bad
    assert len(result.records) == 40
    assert not result.flawless


async def test_check_asks_again_alone_and_catches_answers_that_a_batch_changes(server: FakeServer) -> None:
    server.token_delay_s = 0.002  # so that requests overlap
    trace = make_trace()
    right = await load(trace, server, concurrency=8, check=True)
    assert right.check is not None
    assert (right.check.compared, right.check.wrong, right.check.unverified) == (40, [], [])
    assert right.flawless

    server.lies.add("adapter-000")
    wrong = await load(trace, server, concurrency=8, check=True)
    assert wrong.check is not None
    asked = {request.id: request for request in trace}
    assert wrong.check.wrong
    assert {one.adapter for one in wrong.check.wrong} == {"adapter-000"}
    assert all(one.first_difference == asked[one.id].max_tokens - 1 for one in wrong.check.wrong)
    assert not wrong.flawless


async def test_recorded_answers_catch_a_wrong_one(server: FakeServer, tmp_path: Path) -> None:
    trace = make_trace()
    alone = await load(trace, server, concurrency=1)
    write_answers(tmp_path / "answers.json", answers_of(trace, alone.records))
    expected = read_answers(tmp_path / "answers.json")

    assert (await load(trace, server, concurrency=8, expected=expected)).flawless

    victim = answer_key(trace[3])
    ids = list(expected[victim].token_ids or [])
    ids[1] += 1
    expected[victim] = type(expected[victim])(expected[victim].adapter, ids, "")
    result = await load(trace, server, concurrency=8, expected=expected)
    assert result.check is not None
    assert [(one.id, one.first_difference) for one in result.check.wrong] == [(3, 1)]
    assert not result.flawless


async def test_answers_that_nothing_is_expected_for_are_unverified(server: FakeServer) -> None:
    trace = make_trace(10)
    alone = await load(trace[:6], server, concurrency=1)
    result = await load(trace, server, concurrency=2, expected=answers_of(trace, alone.records))
    assert result.check is not None
    assert (result.check.compared, result.check.unverified) == (6, [6, 7, 8, 9])
    assert not result.flawless


async def test_text_is_compared_where_there_are_no_token_ids(server: FakeServer) -> None:
    trace = make_trace(5)
    with_ids = (await load(trace, server, concurrency=1)).records
    server.knows_token_ids = False
    without = (await load(trace, server, concurrency=1)).records
    assert check_answers(trace, without, answers_of(trace, with_ids), "").wrong == []
    without[2].text += "more"
    assert [one.id for one in check_answers(trace, without, answers_of(trace, with_ids), "").wrong] == [2]


async def test_stop_sends_no_more_and_lets_the_rest_end(server: FakeServer) -> None:
    server.token_delay_s = 0.002
    stop, records = asyncio.Event(), []
    replaying = asyncio.create_task(replay(make_trace(), server.target(), records, concurrency=3, stop=stop))
    await until(lambda: len(records) >= 5)
    stop.set()
    await replaying
    assert 5 <= len(records) <= 9
    assert all(record.error is None for record in records)


def test_a_key_names_all_that_is_asked() -> None:
    request = TraceRequest(id=0, arrival_s=0.0, adapter="a", rank=1, prompt=[1], max_tokens=2)
    same = TraceRequest(id=9, arrival_s=3.0, adapter="a", rank=4, prompt=[1], max_tokens=2)
    others = [
        TraceRequest(id=0, arrival_s=0.0, adapter=None, rank=1, prompt=[1], max_tokens=2),
        TraceRequest(id=0, arrival_s=0.0, adapter="a", rank=1, prompt=[2], max_tokens=2),
        TraceRequest(id=0, arrival_s=0.0, adapter="a", rank=1, prompt=[1], max_tokens=3),
    ]
    assert answer_key(request) == answer_key(same)
    assert len({answer_key(request), *map(answer_key, others)}) == 4


async def test_result_file_round_trip(server: FakeServer, tmp_path: Path) -> None:
    result = await load(make_trace(5), server, concurrency=2, check=True)
    write_result(tmp_path / "r.json", result)
    assert read_result(tmp_path / "r.json") == result
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(ValueError, match=r"r\.json"):
        read_result(tmp_path / "r.json")


async def test_the_progress_line_shows_what_came(server: FakeServer) -> None:
    server.refuses.add("adapter-000")
    drawn = io.StringIO()
    trace = make_trace(20)
    await run_load(trace, server.target(), label="t", concurrency=2, console=Console(file=drawn, width=200))
    bad = sum(request.adapter == "adapter-000" for request in trace)
    assert "20/20" in drawn.getvalue()
    assert f"0 in flight  {bad} errors" in drawn.getvalue()
    assert "tokens/s" in drawn.getvalue()
    assert f"{bad} failed, for example: HTTP 503: draining" in drawn.getvalue()
