"""The one call for a machine with a GPU, run here from end to end with a `python3` and a `timeout` that act.

A card is lent for one call of ten minutes: a mistake in the shell must not waste it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from load_tests.gpu.benchmarks import PARTS

RUN = Path(__file__).resolve().parents[2] / "load_tests" / "gpu" / "run.sh"
CHECKS = ["smoke", "tests", "alone"]
FILES_BACK = 8  # that such a machine returns at most
PYTHON = """#!{python}
import json, os, pathlib, sys, tarfile, time

words = " ".join(sys.argv[1:])
out = pathlib.Path(os.environ["OUT"])


def archived():
    return tarfile.open(out / "all.tgz").getnames() if (out / "all.tgz").exists() else []


calls = pathlib.Path(os.environ["CALLS"])
with calls.open("a") as file:
    note = dict(words=words, limit=os.environ.pop("STEP_LIMIT", None), archive=archived())
    note["files"] = [path.name for path in out.iterdir()]
    file.write(json.dumps(note) + "\\n")
for asked, (say, statuses) in json.loads(os.environ["PLAN"]).items():
    if asked in words:
        break
else:
    asked, say, statuses = words, "", [0]
times = sum(asked in json.loads(line)["words"] for line in calls.read_text().splitlines())
print(say)
if "load_tests.gpu.benchmarks" in words:
    folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    name = sys.argv[-1] if sys.argv[-2] != "--seconds" else "engine"
    (folder / f"{{name}}.txt").write_text(f"table of {{name}}")
    with (folder / "parts.txt").open("a") as file:
        file.write(f"{{name}} begun\\n{{name}} ok after 3 s\\n")
    while "wait" in say and f"./{{name}}.txt" not in archived():
        time.sleep(0.1)
sys.exit(statuses[min(times, len(statuses)) - 1])
"""
TIMEOUT = """#!/bin/sh
[ "$1 $2" = "-k 5" ] || exit 99
export STEP_LIMIT=$3
shift 3
exec "$@"
"""


@dataclass
class Called:
    status: int
    output: str
    calls: list[dict[str, Any]]
    out: Path
    archive: dict[str, str] = field(default_factory=dict)  # what each file in it says

    @property
    def steps(self) -> list[str]:
        """What ran with a limit: the marks of tests, the parts of benchmarks."""
        found = [
            re.search(r" -m ((?:not )?\w+)|--seconds \d+ ?(.*)$", call["words"]) for call in self.limited
        ]
        return [match[1] or match[2] or "all" for match in found if match]

    @property
    def limited(self) -> list[dict[str, Any]]:
        return [call for call in self.calls if call["limit"] is not None]


class Card:
    """Calls run.sh with the two programs that act."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name, text in (("python3", PYTHON.format(python=sys.executable)), ("timeout", TIMEOUT)):
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)

    def run(
        self, *names: str, plan: dict[str, tuple[str, list[int]]] | None = None, **options: str
    ) -> Called:
        """`plan`: of a call that holds such words, what it prints, and its exit status each time."""
        out, calls = self._folder / "out", self._folder / "calls"
        (self._folder / "tmp").mkdir(exist_ok=True)
        environment = os.environ | {
            "PATH": f"{self._folder / 'bin'}:{os.environ['PATH']}",
            "OUT": str(out),
            "TMPDIR": str(self._folder / "tmp"),
            "CALLS": str(calls),
            "PLAN": json.dumps(plan or {}),
            **options,
        }
        done = subprocess.run(
            ["bash", RUN, *names], env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        made = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        called = Called(done.returncode, done.stdout + done.stderr, made, out)
        if (out / "all.tgz").exists():
            with tarfile.open(out / "all.tgz") as archive:
                files = [member for member in archive.getmembers() if member.isfile()]
                called.archive = {
                    file.name.removeprefix("./"): archive.extractfile(file).read().decode() for file in files
                }
        return called


@pytest.fixture
def card(tmp_path: Path) -> Card:
    return Card(tmp_path)


def test_everything_in_order_and_all_of_it_comes_back(card: Card) -> None:
    called = card.run()
    assert called.status == 0, called.output
    assert called.steps == ["ceilings", "smoke", "not smoke", "alone", "all"]
    assert {path.name for path in called.out.iterdir()} == {"all.tgz", "summary.txt"}
    logs = {"benchmarks.log", "smoke.log", "tests.log", "alone.log"}
    assert logs | {"parts.txt", "ceilings.txt", "engine.txt", "summary.txt", "steps.txt"} <= set(
        called.archive
    )
    summary = (called.out / "summary.txt").read_text()
    assert "--- ceilings ok after 3 s\ntable of ceilings" in summary
    assert "--- engine ok after 3 s\ntable of engine" in summary
    assert summary.splitlines()[0].startswith("benchmarks: exit 0")
    assert "failed: nothing" in summary
    assert called.output.endswith(summary)


def test_what_ran_so_far_is_in_the_archive_before_the_next_step(card: Card) -> None:
    called = card.run()
    held = [set(call["archive"]) for call in called.limited]
    for number, log in enumerate(["benchmarks", "smoke", "tests", "alone"], 1):
        assert f"./{log}.log" in held[number]
    assert all(len(call["files"]) <= FILES_BACK for call in called.calls)


def test_a_killed_call_leaves_what_its_last_step_has_measured(card: Card) -> None:
    """The part ends only when the archive holds what it has written."""
    assert card.run("swap", plan={"benchmarks": ("wait", [0])}, PACK_EVERY="0").status == 0


def test_when_a_path_is_wrong_nothing_else_is_run(card: Card) -> None:
    called = card.run(plan={"-m smoke": ("E   relative error 0.5", [1])})
    assert called.status == 1
    assert called.steps == ["ceilings", "smoke"]
    assert "relative error 0.5" in called.output
    assert "relative error 0.5" in called.archive["smoke.log"]


def test_when_a_package_is_missing_nothing_is_spent(card: Card) -> None:
    called = card.run(plan={"load_tests.gpu.packages": ("pip download this", [3])})
    assert called.status == 3
    assert called.calls[-1]["words"] == "-m load_tests.gpu.packages"
    assert called.limited == []
    assert "pip download this" in called.output


def test_failed_tests_do_not_stop_measurements_and_are_named(card: Card) -> None:
    says = (
        "[gw1] [ 17%] FAILED tests/gpu/test_x.py::test_y[one, two]\n"
        "worker 'gw0' crashed while running 'tests/gpu/test_x.py::test_z'\n"
        "===== 1 failed, 7 passed in 0.12s ====="
    )
    called = card.run(plan={"not smoke": (says, [1])})
    assert called.status == 1
    assert called.steps[-1] == "all"
    summary = (called.out / "summary.txt").read_text()
    assert "FAILED tests/gpu/test_x.py::test_y[one, two]" in summary
    assert "crashed while running" in summary
    assert "1 failed, 7 passed" in summary
    assert "failed: tests (1)" in summary


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["swap", "engine"], ["swap engine"]),
        (["tests"], ["not smoke"]),
        (["sweep", "alone"], ["alone", "sweep"]),
        (["smoke", "ceilings"], ["smoke", "ceilings"]),
    ],
)
def test_only_what_is_named(card: Card, names: list[str], steps: list[str]) -> None:
    called = card.run(*names)
    assert (called.status, called.steps) == (0, steps)


def test_an_unknown_part_is_named_before_anything_is_run(card: Card) -> None:
    called = card.run("engine", "swop")
    assert (called.status, called.calls) == (2, [])
    assert "no such part: swop" in called.output
    assert all(name in called.output for name in (*CHECKS, *PARTS))


def test_where_the_process_died_another_goes_on(card: Card) -> None:
    called = card.run("engine", "swap", plan={"benchmarks": ("Segmentation fault", [139, 0])})
    assert called.steps == ["engine swap", "engine swap"]
    assert called.status == 1
    assert "failed: benchmarks (139)" in called.output


def test_parts_that_failed_are_not_run_again(card: Card) -> None:
    called = card.run("engine", plan={"benchmarks": ("", [3])})
    assert (called.status, called.steps) == (1, ["engine"])


def test_nothing_begins_after_the_time_of_the_call(card: Card) -> None:
    called = card.run("tests", "swap", LIMIT="0")
    assert (called.status, called.limited) == (1, [])
    assert "tests: not begun, no time left" in (called.out / "summary.txt").read_text()


def test_the_limits_fit_into_one_call(card: Card) -> None:
    called = card.run()
    *checks, benchmarks = [int(call["limit"]) for call in called.limited]
    parts = [part.seconds for name, part in PARTS.items() if name != "ceilings" and not part.extra]
    assert (
        sum(checks) + sum(parts) + 20 <= 540
    )  # 20: wheels, imports, and what parts begin in time but end late
    assert 500 < benchmarks <= 540  # whatever the steps before it leave
    assert (stops := re.search(r"--seconds (\d+)", called.limited[-1]["words"])) is not None
    assert int(stops[1]) + 15 <= benchmarks  # it ends before it is ended


def test_it_knows_every_part() -> None:
    names = dict(re.findall(r"^(checks|benchmarks)=\((.*)\)$", RUN.read_text(), re.MULTILINE))
    assert (names["checks"].split(), names["benchmarks"].split()) == (CHECKS, list(PARTS))


def test_tests_run_with_what_such_a_machine_has(card: Card) -> None:
    for call in card.run(*CHECKS).limited:
        assert call["words"].startswith("-m pytest -v ")
        assert "--continue-on-collection-errors" in call["words"]
        assert "-o addopts= -o filterwarnings=default -o timeout=60" in call["words"]
        assert ("-n 6" in call["words"]) == ("-m not smoke" in call["words"])
