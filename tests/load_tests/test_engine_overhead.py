from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from load_tests.__main__ import app
from load_tests.engine_overhead import PARTS, measure


@pytest.mark.parametrize("adapters", [0, 1, 6])
def test_every_part_is_timed(adapters: int) -> None:
    measured = measure(sequences=6, adapters=adapters, steps=40)  # past two ends of blocks
    assert set(measured.parts) == {*PARTS, "step"}
    for times in measured.parts.values():
        assert 0 < times.median <= times.p99
    assert all(measured.parts[part].median < measured.parts["step"].median for part in PARTS)


def test_the_command_writes_json(tmp_path: Path) -> None:
    options = ("--sequences", 4, "--adapters", "0,2", "--steps", 5, "--out", tmp_path / "o.json")
    result = CliRunner().invoke(app, ["engine-overhead", *map(str, options)])
    assert result.exit_code == 0, result.output
    assert "publish" in result.output
    runs = json.loads((tmp_path / "o.json").read_text())
    assert [(run["sequences"], run["adapters"], run["steps"]) for run in runs] == [(4, 0, 5), (4, 2, 5)]
