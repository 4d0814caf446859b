"""The client over a real engine process (the echo engine: no torch)."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from server.border.client import HUNG_FACTOR, EngineClient, EngineStartFailed, ProcessEngineClient
from server.config import Settings
from server.errors import EngineDied, Unavailable
from server.messages import (
    AdapterRef,
    EngineInfo,
    ErrorCode,
    Fork,
    Request,
    SamplingParams,
    TokenOutput,
)
from tests.engine.echo_engine import CRASH, HANG, REFUSE

ECHO = "tests.engine.echo_engine"
PATIENCE_S = 20  # how long a test waits for what must happen; a busy machine is slow
ENDLESS = 10**9


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the processes of a test make their private folders."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@asynccontextmanager
async def serving(factory: str = "create_paced_engine", **options: Any) -> AsyncIterator[ProcessEngineClient]:
    client = ProcessEngineClient(Settings(model="echo", **options), f"{ECHO}:{factory}")
    await client.start()
    try:
        await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
        yield client
    finally:
        await client.stop()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # attributes of the client set no Event
            await asyncio.sleep(0.005)


def request(name: str = "a", prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 5) -> Request:
    return Request(name, list(prompt), SamplingParams(max_tokens=max_tokens))


async def collect(client: EngineClient, wanted: Request) -> list[TokenOutput]:
    return [output async for output in client.generate(wanted)]


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def aborted(client: ProcessEngineClient) -> tuple[str, ...]:
    return client.stats.waiting_digests if client.stats else ()


async def open_streams(client: EngineClient, count: int) -> list[asyncio.Task[list[TokenOutput]]]:
    """Endless requests, each of which has had its first output."""
    begun = [asyncio.Event() for _ in range(count)]

    async def follow(number: int) -> list[TokenOutput]:
        outputs = []
        async for output in client.generate(request(f"endless-{number}", max_tokens=ENDLESS)):
            outputs.append(output)
            begun[number].set()
        return outputs

    tasks = [asyncio.create_task(follow(number)) for number in range(count)]
    async with asyncio.timeout(PATIENCE_S):
        for event in begun:
            await event.wait()
    return tasks


async def test_streams_a_token_a_step_and_ends_once() -> None:
    async with serving() as client:
        assert client.info is not None
        assert client.healthy
        outputs = await collect(client, request())
        assert outputs == [
            *(TokenOutput("a", [token]) for token in (1, 2, 3, 1)),
            TokenOutput("a", [2], "length"),
        ]
        await until(lambda: client.stats and client.stats.generated_tokens == 5)
        assert aborted(client) == ()
    assert client.state == "stopped"


async def test_two_hundred_streams_keep_their_own_tokens() -> None:
    async with serving("create_engine") as client:
        wanted = [request(f"r{i}", (i, i + 1), 10 + i % 7) for i in range(1, 201) if i not in (REFUSE,)]
        answers = await asyncio.gather(*(collect(client, each) for each in wanted))
        for each, outputs in zip(wanted, answers, strict=True):
            first, second = each.prompt_token_ids
            length = each.sampling.max_tokens
            assert tokens(outputs) == ([first, second] * length)[:length]
            assert {output.request_id for output in outputs} == {each.request_id}
            assert [output.finish_reason for output in outputs] == [None] * (length - 1) + ["length"]


async def test_closing_early_aborts() -> None:
    async with serving() as client:
        stream = client.generate(request("left", max_tokens=ENDLESS))
        assert (await anext(stream)).token_ids == [1]
        await stream.aclose()
        await until(lambda: aborted(client) == ("left",))
        await until(lambda: client.stats and client.stats.running == 0)


async def test_cancellation_aborts() -> None:
    async with serving() as client:
        (task,) = await open_streams(client, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: aborted(client) == ("endless-0",))
        assert tokens(await collect(client, request())) == [1, 2, 3, 1, 2]


async def test_closing_at_the_terminal_output_does_not_abort() -> None:
    async with serving() as client:
        stream = client.generate(request(max_tokens=1))
        assert (await anext(stream)).finish_reason == "length"
        await stream.aclose()
        await collect(client, request("b"))
        await until(lambda: client.stats and client.stats.generated_tokens == 6)
        assert aborted(client) == ()


def forked(*names: str, max_tokens: int = 5) -> Request:
    first, *others = names
    forks = tuple(Fork(name) for name in others)
    return Request(first, [1, 2, 3], SamplingParams(max_tokens=max_tokens), forks=forks)


async def test_all_choices_of_a_request_come_in_one_stream() -> None:
    async with serving() as client:
        outputs = await collect(client, forked("a", "b", "c"))
        for name in "abc":
            mine = [output for output in outputs if output.request_id == name]
            assert tokens(mine) == [1, 2, 3, 1, 2]
            assert [output.finish_reason for output in mine] == [None] * 4 + ["length"]
        await until(lambda: client.stats and client.stats.generated_tokens == 15)
        assert aborted(client) == ()


async def test_one_choice_may_be_given_up() -> None:
    async with serving() as client:
        client.abort("nobody")
        others = []
        async for output in client.generate(forked("a", "b", max_tokens=50)):
            if output.request_id == "a":
                client.abort("a")
                client.abort("a")  # once is enough
            else:
                others.append(output)
        assert len(tokens(others)) == 50
        await until(lambda: aborted(client) == ("a",))


async def test_closing_early_aborts_the_choices_that_run() -> None:
    async with serving() as client:
        stream = client.generate(forked("a", "b", "c", max_tokens=ENDLESS))
        await anext(stream)
        client.abort("b")
        await stream.aclose()
        await until(lambda: sorted(aborted(client)) == ["a", "b", "c"])
        await until(lambda: client.stats and client.stats.running == 0)


async def test_a_refused_request_fails_alone() -> None:
    async with serving() as client:
        bad, good = await asyncio.gather(
            collect(client, request("bad", (REFUSE,))), collect(client, request("good"))
        )
        assert [(o.finish_reason, o.error) for o in bad] == [("error", ErrorCode.INTERNAL)]
        assert tokens(good) == [1, 2, 3, 1, 2]


async def test_adapter_calls_are_answered() -> None:
    async with serving() as client:
        loaded, missing = await asyncio.gather(
            client.load_adapter(AdapterRef("d1", "path"), pin=True),
            client.load_adapter(AdapterRef("missing", "path")),
        )
        assert (loaded.residency, loaded.error) == ("arena", None)
        assert missing.error == ErrorCode.ADAPTER_LOAD_FAILED
        await until(lambda: client.stats and client.stats.resident == ("d1",))
        assert (await client.unload_adapter("d1", forget=True)).residency == "disk"
        assert (await client.unload_adapter("unknown")).error == ErrorCode.INTERNAL


async def test_kill_fails_every_open_call_and_the_engine_comes_back() -> None:
    readied: list[EngineInfo | None] = []
    async with serving() as client:

        async def reload(resident: tuple[str, ...]) -> None:
            await client.load_adapter(AdapterRef("pinned", "path"), pin=True)
            readied.append(client.info)

        client.on_ready = reload
        old = client.info
        assert old is not None
        tasks = await open_streams(client, 50)
        os.kill(old.pid, signal.SIGSTOP)  # so that the load below is still open when the kill comes
        load = asyncio.create_task(client.load_adapter(AdapterRef("d", "path")))
        await asyncio.sleep(0)
        os.kill(old.pid, signal.SIGKILL)
        endings = await asyncio.wait_for(asyncio.gather(*tasks, load, return_exceptions=True), PATIENCE_S)
        assert [type(ending) for ending in endings] == [EngineDied] * 51
        assert client.state == "restarting"
        assert not client.healthy
        assert client.failure == "process was ended by SIGKILL"
        with pytest.raises(Unavailable, match="restarting"):
            await collect(client, request())
        await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
        assert client.info is not None
        assert client.info.pid != old.pid
        assert (client.restarts, client.failure) == (1, None)
        assert tokens(await collect(client, request("endless-0"))) == [1, 2, 3, 1, 2]
        await until(lambda: readied)
        assert readied == [client.info]
        await until(lambda: client.stats and client.stats.resident == ("pinned",))


async def kill(client: ProcessEngineClient) -> None:
    assert client.info is not None
    os.kill(client.info.pid, signal.SIGKILL)
    await until(lambda: client.state == "restarting")


async def test_adapters_are_back_before_the_engine_is_ready_again() -> None:
    async with serving() as client:
        states: list[str] = []

        async def bring_back(resident: tuple[str, ...]) -> None:
            for digest in resident:
                await client.load_adapter(AdapterRef(digest, "path"))
            states.append(client.state)

        client.on_ready = bring_back
        for digest in ("older", "newer"):
            await client.load_adapter(AdapterRef(digest, "path"))
        await until(lambda: client.stats and client.stats.resident == ("older", "newer"))
        await kill(client)
        with pytest.raises(Unavailable, match="restarting"):
            await client.load_adapter(AdapterRef("too early", "path"))
        await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
        assert states == ["restarting"]
        assert client.stats is not None
        assert client.stats.resident == ("older", "newer")


async def test_adapters_that_take_long_do_not_keep_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.border.client.RESTORE_S", 0.1)
    async with serving() as client:
        left = asyncio.Event()

        async def hang(resident: tuple[str, ...]) -> None:
            await client.load_adapter(AdapterRef("never", "path"))
            left.set()

        client.on_ready = hang
        await kill(client)
        await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
        assert not left.is_set()
        assert tokens(await collect(client, request())) == [1, 2, 3, 1, 2]


async def test_an_adapter_that_ends_the_engine_is_not_brought_back_for_ever() -> None:
    async with serving() as client:
        tries = []

        async def crash(resident: tuple[str, ...]) -> None:
            tries.append(client.state)
            await client.load_adapter(AdapterRef("deadly", "path"))

        client.on_ready = crash
        await kill(client)
        await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
        assert (tries, client.restarts) == (["restarting"], 2)
        assert tokens(await collect(client, request())) == [1, 2, 3, 1, 2]


async def test_a_silent_engine_is_asked_nothing_and_comes_back_to_itself() -> None:
    async with serving(watchdog_s=1.0) as client:  # twice the time between an idle engine's heartbeats
        assert client.info is not None
        os.kill(client.info.pid, signal.SIGSTOP)
        await until(lambda: not client.healthy)
        for call in (collect(client, request()), client.load_adapter(AdapterRef("d", "path"))):
            with pytest.raises(Unavailable, match="does not answer") as refused:
                await call
            assert refused.value.retry_after_s is not None
            assert 1 <= refused.value.retry_after_s <= HUNG_FACTOR + 1
        os.kill(client.info.pid, signal.SIGCONT)
        await until(lambda: client.healthy)
        assert tokens(await collect(client, request())) == [1, 2, 3, 1, 2]


async def test_engines_that_die_again_and_again_are_each_replaced_by_their_spare() -> None:
    """However soon after another: only starts that fail are put off longer and longer."""
    async with serving() as client:
        assert client.info is not None
        for life in range(1, 6):
            engine = psutil.Process(client.info.pid)
            assert engine.ppid() == os.getpid()
            await until(engine.children)
            (spare,) = engine.children()
            began = time.monotonic()
            await kill(client)
            assert client._due_at - began < 1 + client._load_s  # the first delay, each time
            await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
            assert (client.info.pid, client.restarts) == (spare.pid, life)
            assert not engine.is_running()


async def test_without_a_spare_it_comes_back_all_the_same() -> None:
    async with serving(spare_engine=False) as client:
        assert client.info is not None
        assert psutil.Process(client.info.pid).children() == []
        await kill(client)
        await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
        assert tokens(await collect(client, request())) == [1, 2, 3, 1, 2]


async def test_a_step_that_raises_restarts_the_engine() -> None:
    async with serving() as client:
        (bystander,) = await open_streams(client, 1)
        with pytest.raises(EngineDied):
            await collect(client, request("bad", (CRASH,)))
        with pytest.raises(EngineDied):
            await bystander
        assert client.failure == "process ended with code 70"
        await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
        assert tokens(await collect(client, request())) == [1, 2, 3, 1, 2]


async def test_a_hung_engine_is_unhealthy_then_killed_and_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.border.client.HUNG_FACTOR", 2)
    async with serving(watchdog_s=1.0) as client:  # twice the time between an idle engine's heartbeats
        task = asyncio.create_task(collect(client, request("stuck", (HANG,))))
        await until(lambda: not client.healthy)
        assert client.state == "ready"
        with pytest.raises(EngineDied):
            await asyncio.wait_for(task, PATIENCE_S)
        assert client.failure == "process was ended by SIGKILL"
        await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
        assert client.healthy


async def test_restarts_go_on_until_one_succeeds(folder: Path) -> None:
    async with serving("create_refusable_engine", data_dir=folder) as client:
        (folder / "refuse").touch()
        assert client.info is not None
        os.kill(client.info.pid, signal.SIGKILL)
        await until(lambda: client.failure == "refused this time" and client.restarts >= 2)
        assert client.state == "restarting"
        (folder / "refuse").unlink()
        await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
        assert client.failure is None


async def test_who_finds_no_engine_is_told_how_long_a_start_takes(folder: Path) -> None:
    async with serving("create_late_engine", data_dir=folder) as client:
        whole = client.retry_after_s
        assert whole >= 2  # seconds, rounded up
        (folder / "hang").touch()
        (stream,) = await open_streams(client, 1)
        assert client.info is not None
        os.kill(client.info.pid, signal.SIGKILL)
        with pytest.raises(EngineDied) as died:
            await stream
        assert died.value.retry_after_s == whole
        await until(lambda: client.retry_after_s < whole)  # so much of it has gone by
        with pytest.raises(Unavailable, match="restarting") as refused:
            await collect(client, request())
        assert 1 <= (refused.value.retry_after_s or 0) < whole
        await until(lambda: client.retry_after_s == 1)  # never less, however late it is
        assert client.state == "restarting"


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("create_refused_engine", "model echo is refused"),
        ("create_dying_engine", "process ended with code 3"),
        ("no_such_factory", "no_such_factory"),
    ],
)
async def test_a_first_start_that_fails_is_final(factory: str, reason: str, folder: Path) -> None:
    client = ProcessEngineClient(Settings(model="echo"), f"{ECHO}:{factory}")
    await client.start()
    with pytest.raises(Unavailable, match="loading"):
        await collect(client, request())
    with pytest.raises(EngineStartFailed, match=reason):
        await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
    assert client.state == "failed"
    assert client.restarts == 0
    with pytest.raises(Unavailable, match="could not start"):
        await client.load_adapter(AdapterRef("d", "path"))
    assert names_in(folder) == []
    await client.stop()


async def test_stop_ends_what_is_open_and_leaves_nothing(folder: Path) -> None:
    async with serving() as client:
        assert client.info is not None
        child = psutil.Process(client.info.pid)
        tasks = await open_streams(client, 3)
        await client.stop()
        endings = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(ending) for ending in endings] == [Unavailable] * 3
        assert not child.is_running()
        assert names_in(folder) == []
        with pytest.raises(Unavailable, match="shutting down"):
            await client.wait_ready()
        with pytest.raises(Unavailable, match="shutting down"):
            await collect(client, request())


async def test_stop_while_loading_is_quick_and_wakes_who_waits(folder: Path) -> None:
    client = ProcessEngineClient(Settings(model="echo"), f"{ECHO}:create_slow_engine")
    await client.start()
    waiting = asyncio.create_task(client.wait_ready())
    await until(lambda: names_in(folder))
    await asyncio.wait_for(client.stop(), PATIENCE_S)
    with pytest.raises(Unavailable):
        await waiting
    assert names_in(folder) == []


async def test_stop_before_start_is_harmless() -> None:
    client = ProcessEngineClient(Settings(model="echo"), f"{ECHO}:create_engine")
    await client.stop()
    assert client.state == "stopped"


async def test_heartbeats_arrive_while_idle() -> None:
    async with serving() as client:
        before = client.last_heartbeat
        await until(lambda: client.last_heartbeat > before + 0.9)  # at least two of them
        assert client.heartbeat_age < time.monotonic() - before
        assert client.stats is not None
        assert client.stats.steps == 0


async def test_a_hook_that_raises_does_not_harm() -> None:
    called: list[tuple[str, ...]] = []

    def hook(resident: tuple[str, ...]) -> None:
        called.append(resident)
        raise RuntimeError("hook")

    client = ProcessEngineClient(Settings(model="echo"), f"{ECHO}:create_engine")
    client.on_ready = hook
    await client.start()
    await asyncio.wait_for(client.wait_ready(), PATIENCE_S)
    assert tokens(await collect(client, request())) == [1, 2, 3, 1, 2]
    assert called == [()]
    await client.stop()


def test_under_uvloop(folder: Path) -> None:
    async def scenario() -> None:
        async with serving("create_engine") as client:
            wanted = [request(f"r{i}", (i + 100,), 50) for i in range(50)]
            answers = await asyncio.gather(*(collect(client, each) for each in wanted))
            assert [tokens(outputs) for outputs in answers] == [[i + 100] * 50 for i in range(50)]
            tasks = await open_streams(client, 5)
            assert client.info is not None
            os.kill(client.info.pid, signal.SIGKILL)
            endings = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE_S)
            assert [type(ending) for ending in endings] == [EngineDied] * 5
            await asyncio.wait_for(client.wait_ready(), PATIENCE_S)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())
    assert names_in(folder) == []
