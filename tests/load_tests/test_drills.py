"""The drills in short: some cases, a small fuzz and soak on one real server; and how faults are told."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from load_tests.__main__ import app
from load_tests.drills import cases as _  # noqa: F401  (makes them known)
from load_tests.drills.case import CASES, Case, expect
from load_tests.drills.fuzz import fuzz_cases
from load_tests.drills.mutations import damaged_json, mutated_archive, mutated_files
from load_tests.drills.play import Result, play_all, table
from load_tests.drills.site import Books, Site
from load_tests.drills.soak import soak_case
from load_tests.drills.watch import Hold, Watch
from load_tests.serving import free_port
from tests.e2e.server import ADAPTERS, MODEL

FAST = (1, 6, 10, 22, 25, 54)
BOOKS = Books(
    running=0, waiting=0, kv_blocks_held=0, staged=0, open_files=("registry.db",), children=4, memory_mib=500
)


async def _leave_something(site: Site) -> str:
    (site.data_dir / "staging" / "left").mkdir()
    return "done"


async def _break(site: Site) -> str:
    expect((await site.complete()).status_code == 418, "it is no teapot")
    return "a teapot"


@pytest.mark.timeout(900)  # a guard against a hang, also on a machine that does much else
def test_cases_a_fuzz_and_a_soak_in_short(tmp_path: Path) -> None:
    """No bound on time here: see docs/reliability.md for the long form, which has one."""
    told = [Case(901, "", "", _leave_something), Case(902, "", "", _break)]
    flags = ("--api-key", "the-key-of-this-test", "--max-model-len", "128", "--dtype", "float32")
    played = [
        *(CASES[number] for number in FAST),
        *fuzz_cases(60, 12, seed=5),
        soak_case(0.03, seed=5, prompts=1),
        *told,
    ]
    cases = [dataclasses.replace(case, flags=flags) for case in played]
    of_an_earlier_run = tmp_path / "server-0" / f"case-{FAST[0]}" / "written"
    of_an_earlier_run.parent.mkdir(parents=True)
    of_an_earlier_run.touch()
    results = {result.number: result for result in play_all(cases, MODEL, ADAPTERS, tmp_path, math.inf)}
    assert not of_an_earlier_run.exists()
    *sound, leaking, broken = results.values()
    assert [(one.number, one.seen, one.leaks) for one in sound if one.verdict != "kept"] == []
    assert {one.number for one in sound} == {*FAST, 101, 102, 103}
    assert (leaking.verdict, leaking.leaks) == ("broken", ["staged: 0 before, 1 after"])
    assert (broken.verdict, broken.seen) == ("broken", "it is no teapot")


def test_what_is_left_is_named() -> None:
    more = dataclasses.replace(
        BOOKS, running=1, open_files=("registry.db", "socket", "socket"), memory_mib=900
    )
    assert BOOKS.leaks(BOOKS) == []
    assert more.leaks(BOOKS) == [
        "running: 0 before, 1 after",
        "1 open files before, after them {'socket': 2} more",
    ]


async def test_a_held_loop_is_told() -> None:
    """By another process, as a client would see it."""
    port = free_port()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with_head = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
        for delay_s in (0.0, 0.4, *[0.0] * 10_000):
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(delay_s)
            writer.write(with_head)

    async with await asyncio.start_server(answer, "127.0.0.1", port):
        watch = await asyncio.to_thread(Watch("127.0.0.1", port, 1).__enter__)
        await asyncio.sleep(1.5)
        await asyncio.to_thread(watch.__exit__, None, None, None)
    assert watch.hold.answer_ms >= 400
    assert watch.hold.loop_ms > 50


def test_the_table_tells_what_else_a_case_cost() -> None:
    kept = Result(2, "b", "p", "kept", "a|b", Hold(12.0, 80.0), (1, 2))
    broken = Result(1, "a", "p", "broken", "seen", Hold(70.0, 70.0), (1, 2), ["running: 0 before, 1 after"])
    assert table([kept, broken]).splitlines()[2:] == [
        "| 1 | a | p | seen; running: 0 before, 1 after | 70 (70 with waiting for a core) | 1 → 2 | broken |",
        "| 2 | b | p | a\\|b | 12 (80 with waiting for a core) | 1 → 2 | kept |",
    ]


def test_equal_seeds_make_equal_mutations() -> None:
    folder = ADAPTERS / "sentiment"
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = {name: (folder / name).read_bytes() for name in names}
    for make in (
        lambda random: mutated_files(files, random),
        lambda random: mutated_archive(files, random)[0],
        lambda random: damaged_json(b'{"model": "base", "n": [1, 2]}', random),
    ):
        once = [make(Random(seed)) for seed in range(30)]
        assert once == [make(Random(seed)) for seed in range(30)]
        assert any(one != once[0] for one in once)


def test_every_case_of_the_list_is_there() -> None:
    assert sorted(CASES) == list(range(1, 61))


def test_a_case_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["drills", "--out", str(tmp_path), "--only", "1,77"])
    assert (result.exit_code, "no case 77" in result.output) == (2, True)


def test_schemathesis_is_wanted_by_the_fuzz_alone() -> None:
    code = (
        "import sys, load_tests.drills.fuzz, load_tests.drills.cases; sys.exit('schemathesis' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
