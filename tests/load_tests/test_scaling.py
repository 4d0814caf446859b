"""What the points are asked, and both experiments against the real `chorus serve`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from typer.testing import CliRunner

from load_tests.__main__ import app
from load_tests.scaling import Load, evenly_spaced

MODEL = Path(__file__).resolve().parents[2] / "models" / "chorus-tiny"
SMALL = "--threads 1 --kv-cache-bytes 16MiB --arena-bytes 16MiB --host-cache-bytes 16MiB"
NAMES = ("a", "b", "c", "d")


def run(*arguments: object) -> tuple[int, str]:
    lengths = ("--concurrency", 4, "--requests", 8, "--prompt-tokens", 4, "--output-tokens", 4)
    options = ("--model", MODEL, *lengths, "--serve-flags", SMALL)
    result = CliRunner().invoke(app, ["scaling", *map(str, arguments), *map(str, options)])
    return result.exit_code, result.output


def test_a_full_batch_holds_every_adapter() -> None:
    trace = Load(concurrency=8, requests=24).trace(NAMES, seed=1)
    for start in range(0, 24, 8):
        assert Counter(r.adapter for r in trace[start : start + 8]) == dict.fromkeys(NAMES, 2)
    assert {(len(r.prompt), r.max_tokens) for r in trace} == {(32, 64)}


def test_no_prompt_comes_twice() -> None:
    load = Load(requests=50)
    prompts = [tuple(r.prompt) for seed in (1, 2) for r in load.trace(NAMES, seed)]
    assert len(set(prompts)) == 100


def test_popularity_when_asked_for() -> None:
    asked = Counter(r.adapter for r in Load(requests=4000).trace(NAMES, seed=1, alpha=1.0))
    assert [name for name, _ in asked.most_common()] == list(NAMES)
    assert 1.7 < asked["a"] / asked["b"] < 2.3


def test_a_working_set_lies_evenly_among_the_names() -> None:
    names = [str(index) for index in range(1000)]
    assert evenly_spaced(names, 4) == ["0", "250", "500", "750"]
    assert evenly_spaced(names, None) == evenly_spaced(names, 5000) == names


def test_distinct(tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, output = run("distinct", "--out", out, "--points", "3,1", "--ranks", "2,4", "--rounds", 2)
    assert status == 0, output
    curve = json.loads((out / "curve.json").read_text())
    samples = curve["samples"]
    assert [(one["round"], one["adapters"]) for one in samples] == [(0, 1), (0, 3), (1, 3), (1, 1)]
    assert all(one["tokens_per_s"] > 0 and one["failed"] == one["adapter_loads"] == 0 for one in samples)
    assert curve["floors"]["3"]["bytes"]["adapters"] == 4 * curve["floors"]["1"]["bytes"]["adapters"]
    assert (out / "curve.md").exists()
    assert (out / "tokens_per_s.png").exists()


def test_registered(tmp_path: Path) -> None:
    out = tmp_path / "out"
    points = ("--points", "2,6", "--working-set", 2, "--rounds", 1)
    status, output = run("registered", "--out", out, *points)
    assert status == 0, output
    samples = json.loads((out / "curve.json").read_text())["samples"]
    assert [one["adapters"] for one in samples] == [2, 6]
    assert all(one["failed"] == one["adapter_loads"] == 0 for one in samples)
    logs = {number: (out / f"serve-{number}-0.log").read_text() for number in (2, 6)}
    assert all(f"{number} registered" in log for number, log in logs.items())


def test_more_adapters_than_requests_are_refused(tmp_path: Path) -> None:
    status, output = run("distinct", "--out", tmp_path, "--points", "1,5")
    assert (status, "4 requests at a time" in output) == (2, True)
