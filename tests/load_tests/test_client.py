from __future__ import annotations

import time
from typing import Any

import pytest

from load_tests.client import Record, Target, complete, open_session
from load_tests.trace import TraceRequest
from tests.load_tests.fake_server import FakeServer

REQUEST = TraceRequest(id=7, arrival_s=0.0, adapter="sql", rank=1, prompt=[1, 2, 3], max_tokens=6)


async def ask(server: FakeServer, request: TraceRequest = REQUEST, **options: Any) -> Record:
    async with open_session() as session:
        return await complete(session, server.target(**options), request, time.perf_counter)


async def test_a_whole_answer(server: FakeServer) -> None:
    record = await ask(server)
    assert record.error is None
    assert record.token_ids == server.answer("sql", [1, 2, 3], 6)
    assert record.text == "".join(f"<{i}>" for i in record.token_ids)
    assert (record.output_tokens, record.prompt_tokens, record.finish_reason) == (6, 3, "length")
    assert record.adapter_version == "sha-sql"
    assert len(record.gaps_s) == 5
    assert record.ttft_s is not None
    assert 0 < record.ttft_s <= record.ttft_s + sum(record.gaps_s) <= record.e2e_s


async def test_what_is_asked(server: FakeServer) -> None:
    base = TraceRequest(id=0, arrival_s=0.0, adapter=None, rank=0, prompt="text", max_tokens=2)
    await ask(server, base, base_model="llama", api_key="secret")
    await ask(server, base, ignore_eos=False, return_token_ids=False, usage=False)
    plain = {"prompt": "text", "max_tokens": 2, "temperature": 0, "stream": True}
    extras = {"ignore_eos": True, "return_token_ids": True, "stream_options": {"include_usage": True}}
    assert server.bodies == [{"model": "llama"} | plain | extras, {"model": "base"} | plain]
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "Authorization" not in server.headers[1]


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_url_may_end_in_v1(suffix: str) -> None:
    assert Target(f"http://host:1{suffix}").completions_url == "http://host:1/v1/completions"


async def test_tokens_of_one_chunk_came_together(server: FakeServer) -> None:
    server.tokens_per_chunk, server.token_delay_s = 4, 0.02
    record = await ask(server)
    assert [gap > 0 for gap in record.gaps_s] == [False, False, False, True, False]


async def test_events_that_arrive_in_pieces(server: FakeServer) -> None:
    server.cuts_lines = True
    record = await ask(server)
    assert (record.error, record.token_ids) == (None, server.answer("sql", [1, 2, 3], 6))


async def test_counts_without_token_ids(server: FakeServer) -> None:
    server.knows_token_ids = False
    server.tokens_per_chunk = 4
    counted = await ask(server)
    assert (counted.output_tokens, counted.token_ids, counted.error) == (6, None, None)  # from usage
    guessed = await ask(server, usage=False, ignore_eos=False)
    assert (guessed.output_tokens, guessed.error) == (2, None)  # chunks


async def test_latency_counts_from_when_it_was_due(server: FakeServer) -> None:
    async with open_session() as session:
        now = time.perf_counter()
        record = await complete(session, server.target(), REQUEST, time.perf_counter, due_s=now - 10)
    assert record.ttft_s is not None
    assert record.ttft_s > 10
    assert record.e2e_s > 10
    assert record.sent_s >= now


@pytest.mark.parametrize(
    ("fault", "error", "tokens"),
    [
        ("refuses", "HTTP 503: draining", 0),
        ("breaks", "connection: ", 1),
        ("ends_early", "stream cut off: no [DONE]", 1),
        ("errs", "error event: engine restarted", 1),
        ("hangs", "timeout: 0.2 s", 1),
        ("falls_short", "wrong length: 5 tokens of 6", 5),
    ],
)
async def test_failures_are_recorded(server: FakeServer, fault: str, error: str, tokens: int) -> None:
    getattr(server, fault).add("sql")
    record = await ask(server, timeout_s=0.2 if fault == "hangs" else 30.0)
    assert record.error is not None
    assert record.error.startswith(error)
    assert len(record.token_ids or []) == tokens


async def test_a_short_answer_is_whole_where_eos_counts(server: FakeServer) -> None:
    server.falls_short.add("sql")
    assert (await ask(server, ignore_eos=False)).error is None


async def test_nobody_listens() -> None:
    async with open_session() as session:
        record = await complete(session, Target("http://127.0.0.1:9"), REQUEST, time.perf_counter)
    assert record.error == "connection: ClientConnectorError"
