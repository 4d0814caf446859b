"""All measurements in one process: their order and times, and what is left when one of them fails or dies."""

from __future__ import annotations

import faulthandler
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from load_tests.gpu import benchmarks
from load_tests.gpu.benchmarks import DIED, PARTS, SOME_FAILED, Ledger, Part, SharedEngine, run
from load_tests.gpu.context import Context
from load_tests.gpu.figures import Deadline
from load_tests.gpu.workload import WORKLOADS

ROOT = Path(__file__).resolve().parents[2]
TINY = WORKLOADS["tiny"]
Measure = Callable[[Context], None]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Measure]:
    """Parts of one's own: what each does, by name. `extra` is one that waits to be named."""
    works: dict[str, Measure] = {}
    parts = {name: Part(10, name) for name in ("a", "b", "c")} | {"extra": Part(30, "extra", extra=True)}
    monkeypatch.setattr(benchmarks, "PARTS", parts)
    monkeypatch.setattr(
        benchmarks.pkgutil,
        "resolve_name",
        lambda path: works.get(path.removeprefix("load_tests.gpu."), nothing),
    )
    return works


def nothing(context: Context) -> None:
    pass


def fail(context: Context) -> None:
    context.results.say("so far so good")
    raise RuntimeError("no such luck")


def states(folder: Path) -> dict[str, str]:
    return {name: state.split(" after")[0] for name, state in Ledger(folder).states.items()}


def test_without_names_extra_parts_need_their_time(measured: dict[str, Measure], tmp_path: Path) -> None:
    assert run([], TINY, tmp_path, Deadline(25)) == 0
    assert list(states(tmp_path)) == ["a", "b", "c"]
    (tmp_path / "long").mkdir()
    assert run([], TINY, tmp_path / "long", Deadline(60)) == 0
    assert list(states(tmp_path / "long")) == ["a", "b", "c", "extra"]
    (tmp_path / "named").mkdir()
    assert run(["extra"], TINY, tmp_path / "named", Deadline(25)) == 0
    assert list(states(tmp_path / "named")) == ["extra"]


def test_a_part_that_fails_is_said_and_the_others_go_on(
    measured: dict[str, Measure], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured["b"] = fail
    assert run([], TINY, tmp_path, Deadline(20)) == SOME_FAILED
    assert states(tmp_path) == {"a": "ok", "b": "failed", "c": "ok"}
    assert 'raise RuntimeError("no such luck")' in capsys.readouterr().err
    said, *_, raised = (tmp_path / "b.txt").read_text().splitlines()
    assert (said, raised) == ("so far so good", "RuntimeError: no such luck")


def test_what_there_is_no_time_for_is_a_failure(measured: dict[str, Measure], tmp_path: Path) -> None:
    assert run([], TINY, tmp_path, Deadline(0)) == SOME_FAILED
    assert states(tmp_path) == dict.fromkeys("abc", "not begun: no time left")


def test_another_process_goes_on_behind_the_part_that_died(
    measured: dict[str, Measure], tmp_path: Path
) -> None:
    def die(context: Context) -> None:
        raise SystemExit(1)

    def never(context: Context) -> None:
        raise AssertionError("it was run before")

    measured["b"] = die
    with pytest.raises(SystemExit):
        run([], TINY, tmp_path, Deadline(20))
    measured["a"] = measured["b"] = never
    assert run([], TINY, tmp_path, Deadline(20)) == SOME_FAILED
    assert states(tmp_path) == {"a": "ok", "b": "died", "c": "ok"}


def test_a_process_that_cuda_refuses_is_left(
    measured: dict[str, Measure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def leave(status: int) -> None:
        raise SystemExit(status)

    measured["a"] = fail
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        run([], TINY, tmp_path, Deadline(20))
    assert left.value.code == DIED
    assert list(states(tmp_path)) == ["a"]


def test_a_part_that_hangs_is_ended(
    measured: dict[str, Measure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the interpreter's own watchdog, which needs no Python to run: armed for each part, and disarmed."""
    calls: list[object] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda s, exit, file: calls.append((s, exit)))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: calls.append("off"))
    measured["a"] = fail
    run(["a", "b"], TINY, tmp_path, Deadline(20))
    assert calls == [(50, True), "off"] * 2


class Engines:
    """Counts the engines that are started, and those that live."""

    def __init__(self) -> None:
        self.started = self.alive = 0

    @contextmanager
    def start(self) -> Iterator[SimpleNamespace]:
        self.started += 1
        self.alive += 1
        yield SimpleNamespace(number=self.started)
        self.alive -= 1


def test_parts_share_one_engine_until_one_of_them_fails(
    measured: dict[str, Measure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = Engines()
    monkeypatch.setattr(SharedEngine, "_start", lambda self: engines.start())
    used = []

    def use(context: Context) -> None:
        used.append(context.shared().number)

    def use_and_fail(context: Context) -> None:
        use(context)
        raise RuntimeError

    measured |= {"a": use, "b": use_and_fail, "c": use}
    benchmarks.PARTS["extra"] = Part(30, "extra", extra=True, alone=True)
    measured["extra"] = lambda context: used.append(-engines.alive)
    run([], TINY, tmp_path, Deadline(60))
    assert used == [1, 1, 2, 0]
    assert engines.alive == 0


def test_an_engine_that_cannot_start_is_not_tried_again(
    measured: dict[str, Measure],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    starts = []

    @contextmanager
    def refuse() -> Iterator[None]:
        starts.append(1)
        raise RuntimeError("the engine runs without graphs")
        yield

    monkeypatch.setattr(SharedEngine, "_start", lambda self: refuse())
    measured |= dict.fromkeys("abc", lambda context: context.shared())
    assert run([], TINY, tmp_path, Deadline(20)) == SOME_FAILED
    assert len(starts) == 1
    assert "in refuse\n" in capfd.readouterr().err  # where it went wrong
    for name in "abc":
        assert "without graphs" in (tmp_path / f"{name}.txt").read_text()


def test_every_part_runs_here(tmp_path: Path) -> None:
    """As `run.sh` calls it, on a tiny model; but for attention, which takes bfloat16, and so a card."""
    names = [name for name in PARTS if name not in {"attention", "kernel-ranks"}]
    command = [sys.executable, "-m", "load_tests.gpu.benchmarks", "--shape", "tiny", "--out", str(tmp_path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *names], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert states(tmp_path) == dict.fromkeys(names, "ok")
    for name in names:
        written = json.loads((tmp_path / f"{name}.json").read_text())
        assert written["shape"] == "tiny"
        assert written["rows"] or written["figures"]
        assert (tmp_path / f"{name}.txt").read_text().strip()
    for name in ("engine", "mixed", "sampling", "profile", "swap", "ranks", "engine-small", "sweep"):
        written = json.loads((tmp_path / f"{name}.json").read_text())
        assert written["fast_paths"] == {"fused": True, "flat": True, "graphs": False}


def test_an_unknown_part_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--out", "/nowhere", "swop"])
    with pytest.raises(SystemExit):
        benchmarks.main()
    assert "no such part: swop" in capsys.readouterr().err


def test_every_part_names_a_function() -> None:
    for part in PARTS.values():
        assert callable(pkgutil.resolve_name(f"load_tests.gpu.{part.measure}"))
