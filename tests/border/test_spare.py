"""Spares: the process that waits to be the next engine (the echo engine: no torch)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from server.border.process import EngineProcess
from server.border.spare import Spares
from server.config import Settings
from server.messages import FromEngine, StepOutputs
from tests.border.test_process import is_gone, until

ECHO = "tests.engine.echo_engine"
PATIENCE_S = 20


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    OTHERS.update(children())
    return tmp_path


async def begun(spares: Spares, wait: bool = True) -> EngineProcess:
    """An engine that has said its first word, and has left a spare where one is kept."""
    messages: list[FromEngine] = []
    process = EngineProcess(Settings(model="echo"), spares, messages.append)
    await process.start()
    await until(lambda: messages)
    if wait:
        await until(lambda: spares.pid)
    return process


async def killed(process: EngineProcess) -> None:
    process.kill()
    await asyncio.wait_for(process.exited, PATIENCE_S)


def waiting(spares: Spares) -> int:
    assert spares.pid is not None
    return spares.pid


def children() -> set[int]:
    """Zombies too."""
    return {child.pid for child in psutil.Process().children()}


OTHERS: set[int] = set()  # what other tests have left


def no_children() -> bool:
    return children() <= OTHERS


async def test_the_spare_becomes_the_next_engine_and_leaves_another() -> None:
    spares = Spares(f"{ECHO}:create_engine", keep=True)
    seen = set()
    process = await begun(spares)
    for _ in range(3):
        seen.add(process.pid)
        next_pid = waiting(spares)
        assert spares.wait_s == 0
        assert psutil.Process(next_pid).ppid() == process.pid  # the face has one child: its engine
        await killed(process)
        assert psutil.Process(next_pid).ppid() == os.getpid()
        process = await begun(spares)
        assert process.pid == next_pid
    assert len(seen) == 3
    assert await process.stop() == 0
    spares.close()
    assert no_children()


async def test_what_an_engine_prepares_its_spare_has_too() -> None:
    spares = Spares(f"{ECHO}:create_engine", keep=True)
    pids = []
    for _ in range(2):
        messages: list[FromEngine] = []
        process = EngineProcess(Settings(model="echo"), spares, messages.append)
        await process.start()
        await until(lambda messages=messages: any(isinstance(m, StepOutputs) and m.stats for m in messages))
        pids.append(str(process.pid))
        told = [m.stats for m in messages if isinstance(m, StepOutputs) and m.stats]
        # The second has what the first prepared before it forked.
        assert list(told[0].running_digests) == pids
        await until(lambda: spares.pid)
        await killed(process)
    spares.close()
    assert no_children()


async def test_an_engine_killed_as_it_begins_leaves_its_copy_or_nothing() -> None:
    """At any moment of the fork: the next one begins all the same, and nobody is left."""
    spares = Spares(f"{ECHO}:create_engine", keep=True)
    process = await begun(spares)
    for pause_ms in range(0, 20, 2):
        await killed(process)
        process = EngineProcess(Settings(model="echo"), spares, lambda message: None)
        await process.start()
        await asyncio.sleep(pause_ms / 1000)
    await killed(process)
    process = await begun(spares)
    assert await process.stop() == 0
    spares.close()
    await until(no_children)


async def test_a_spare_that_ends_is_no_zombie_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.border.spare._AGAIN_S", 0.1)
    spares = Spares(f"{ECHO}:create_engine", keep=True)
    process = await begun(spares)
    first = waiting(spares)
    os.kill(first, signal.SIGKILL)
    await until(lambda: not psutil.pid_exists(first))  # its parent, the engine, has waited for it
    await until(lambda: spares.pid not in (None, first) and spares.wait_s == 0)
    second = waiting(spares)
    assert psutil.Process(second).ppid() == os.getpid()
    await killed(process)
    process = await begun(spares)
    assert process.pid == second
    await killed(process)
    spares.close()
    assert no_children()


async def test_a_spare_that_ends_with_its_engine_is_no_zombie() -> None:
    spares = Spares(f"{ECHO}:create_engine", keep=True)
    process = await begun(spares)
    first = waiting(spares)
    os.kill(process.pid, signal.SIGSTOP)  # so that it cannot wait for its spare
    os.kill(first, signal.SIGKILL)
    await until(lambda: spares.pid is None)
    await killed(process)
    assert no_children()
    process = await begun(spares)
    await killed(process)
    spares.close()
    assert no_children()


async def test_none_is_left_unless_it_is_wanted() -> None:
    spares = Spares(f"{ECHO}:create_engine", keep=False)
    process = await begun(spares, wait=False)
    assert psutil.Process(process.pid).children() == []
    assert spares.pid is None
    await killed(process)
    assert spares.wait_s > 0  # the next has to read its program first
    spares.close()


async def test_a_discarded_spare_is_not_used() -> None:
    spares = Spares(f"{ECHO}:create_engine", keep=True)
    process = await begun(spares)
    first = waiting(spares)
    await killed(process)
    spares.discard()
    assert not psutil.pid_exists(first)
    process = await begun(spares)
    assert process.pid != first
    await killed(process)
    spares.close()
    assert no_children()


async def test_what_an_engine_has_started_ends_with_it() -> None:
    spares = Spares(f"{ECHO}:create_parent_engine", keep=True)
    process = await begun(spares)
    programs = [child for child in psutil.Process(process.pid).children() if child.pid != spares.pid]
    assert len(programs) == 1
    await killed(process)
    await until(lambda: not programs[0].is_running())
    spares.close()
    await until(no_children)


async def test_an_engine_has_nothing_of_its_spare(folder: Path) -> None:
    """Neither the socket that a spare waits at, nor a place in the group of processes that ends with it."""
    spares = Spares(f"{ECHO}:create_engine", keep=True)
    process = await begun(spares)
    assert os.readlink(f"/proc/{process.pid}/fd/0") == os.devnull
    assert os.getpgid(process.pid) == process.pid
    assert os.getpgid(waiting(spares)) == waiting(spares)
    await killed(process)
    spares.close()


PARENT = f"""
import asyncio
from server.config import Settings
from server.border.process import EngineProcess
from server.border.spare import Spares

async def main():
    spares = Spares("{ECHO}:create_engine", keep=True)
    process = EngineProcess(Settings(model="echo"), spares, lambda message: None)
    await process.start()
    while spares.pid is None:
        await asyncio.sleep(0.01)
    print(process.pid, spares.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


def test_the_death_of_the_face_ends_engine_and_spare(folder: Path) -> None:
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={"TMPDIR": str(folder)},
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    asyncio.run(until(lambda: all(is_gone(pid) for pid in pids)))
