"""Lives and deaths of real engine processes (the echo engine: no torch)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from server.border.process import EngineProcess
from server.border.spare import Spares
from server.config import Settings
from server.messages import Failed, FromEngine, Ready, Request, SamplingParams, StepOutputs
from tests.engine.echo_engine import CRASH, HANG

ECHO = "tests.engine.echo_engine"
SETTINGS = Settings(model="echo")
PATIENCE_S = 20  # how long a test waits for what must happen; a busy machine is slow


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the processes of a test make their private folders."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def spares(factory: str) -> Spares:
    """None is kept."""
    return Spares(f"{ECHO}:{factory}", keep=False)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # another process sets no Event here
            await asyncio.sleep(0.005)


async def started(
    factory: str = "create_engine", first: type = Ready
) -> tuple[EngineProcess, list[FromEngine]]:
    """A process that has said its first word, and the list its messages go to."""
    messages: list[FromEngine] = []
    process = EngineProcess(SETTINGS, spares(factory), messages.append)
    await process.start()
    await until(lambda: messages or process.exited.done())
    assert isinstance(messages[0], first)
    return process, messages


async def test_ready_then_a_clean_stop_leaves_nothing(folder: Path) -> None:
    process, messages = await started()
    assert isinstance(messages[0], Ready)
    assert messages[0].info.pid == process.pid
    (private,) = names_in(folder)
    assert (folder / private).stat().st_mode & 0o777 == 0o700
    assert await process.stop() == 0
    assert is_gone(process.pid)
    assert names_in(folder) == []


async def test_idle_heartbeats_come_by_themselves() -> None:
    process, messages = await started()
    await until(lambda: len(messages) >= 4)
    assert all(isinstance(m, StepOutputs) and m.stats is not None for m in messages[1:])
    await process.stop()


async def test_a_refused_start_tells_its_reason_and_ends(folder: Path) -> None:
    process, messages = await started("create_refused_engine", first=Failed)
    assert messages == [Failed("model echo is refused")]
    assert await asyncio.wait_for(process.exited, PATIENCE_S) == 1
    assert names_in(folder) == []


async def test_an_unknown_factory_is_a_failed_start() -> None:
    process, messages = await started("no_such_factory", first=Failed)
    assert "no_such_factory" in messages[0].message  # type: ignore[union-attr]  # started() saw to it
    assert await asyncio.wait_for(process.exited, PATIENCE_S) == 1


async def test_a_step_that_raises_ends_the_process_with_code_70() -> None:
    process, _ = await started()
    process.send(Request("a", [CRASH], SamplingParams(max_tokens=5)))
    assert await asyncio.wait_for(process.exited, PATIENCE_S) == 70


async def test_kill_is_seen_as_a_signal_and_later_messages_go_nowhere(folder: Path) -> None:
    process, messages = await started()
    process.kill()
    assert await asyncio.wait_for(process.exited, PATIENCE_S) == -signal.SIGKILL
    process.send(Request("late", [1], SamplingParams(max_tokens=5)))
    process.kill()
    assert await process.stop() == -signal.SIGKILL
    assert not process.read()
    assert isinstance(messages[0], Ready)
    assert names_in(folder) == []


async def test_a_process_that_still_loads_is_terminated_at_once() -> None:
    process = EngineProcess(SETTINGS, spares("create_slow_engine"), lambda message: None)
    await process.start()
    assert await asyncio.wait_for(process.stop(), PATIENCE_S) == -signal.SIGTERM


async def test_a_hung_process_is_terminated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.border.process._SHUTDOWN_S", 0.1)
    process, _ = await started()
    process.send(Request("a", [HANG], SamplingParams(max_tokens=5)))
    assert await asyncio.wait_for(process.stop(), PATIENCE_S) == -signal.SIGTERM


async def test_a_stopped_process_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.border.process._SHUTDOWN_S", 0.1)
    monkeypatch.setattr("server.border.process._TERM_S", 0.1)
    process, _ = await started()
    os.kill(process.pid, signal.SIGSTOP)
    assert await asyncio.wait_for(process.stop(), PATIENCE_S) == -signal.SIGKILL


async def test_sigint_does_not_end_it() -> None:
    process, messages = await started()
    os.kill(process.pid, signal.SIGINT)
    seen = len(messages)
    await until(lambda: len(messages) >= seen + 2)
    assert await process.stop() == 0


async def test_a_program_that_is_not_there_is_an_oserror(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(folder / "nothing"))
    process = EngineProcess(SETTINGS, spares("create_engine"), lambda message: None)
    with pytest.raises(OSError, match="nothing"):
        await process.start()
    assert names_in(folder) == []


async def test_a_burst_longer_than_one_read_arrives_whole() -> None:
    process, messages = await started()
    count = 1000
    process.send(Request("a", [1, 2], SamplingParams(max_tokens=count)))
    time.sleep(0.3)  # noqa: ASYNC251  # hold the loop, so that many publishes lie there at once
    got: list[int] = []

    def done() -> bool:
        got[:] = [t for m in messages if isinstance(m, StepOutputs) for o in m.outputs for t in o.token_ids]
        return len(got) >= count

    await until(done)
    assert got == [1, 2] * (count // 2)
    await process.stop()


PARENT = f"""
import asyncio
from server.config import Settings
from server.border.process import EngineProcess
from server.border.spare import Spares

async def main():
    def tell(message):
        print(process.pid, flush=True)

    process = EngineProcess(Settings(model="echo"), Spares("{ECHO}:FACTORY", keep=False), tell)
    await process.start()
    print(process.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.parametrize("factory", ["create_engine", "create_slow_engine"])
def test_the_death_of_the_face_ends_the_engine(factory: str, folder: Path) -> None:
    command = [sys.executable, "-c", PARENT.replace("FACTORY", factory)]
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=root, env={"TMPDIR": str(folder)}
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline().strip() == (str(pid) if factory == "create_engine" else "loading")
    assert not is_gone(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    asyncio.run(until(lambda: is_gone(pid)))
