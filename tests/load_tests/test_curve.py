from __future__ import annotations

import struct
from pathlib import Path

import msgspec
import pytest

from load_tests.curve import Curve, Floor, Sample, Spread, rows, write_curve
from load_tests.floor import Machine, StepBytes


def sample(adapters: int, number: int, tokens_per_s: float, failed: int = 0) -> Sample:
    return Sample(adapters, number, tokens_per_s, 0.1, 0.2, 0.01, failed, adapter_loads=0, ready_s=1.5)


FLOORS = {
    1: Floor(StepBytes(8_000_000, 1_000_000, 1_000_000), step_s=0.01, tokens_per_s=400.0),
    64: Floor(StepBytes(8_000_000, 64_000_000, 1_000_000), step_s=0.073, tokens_per_s=55.0),
}
SAMPLES = [
    sample(64, 0, 20.0),
    sample(1, 0, 100.0),
    sample(1, 1, 300.0),
    sample(64, 1, 50.0),
    sample(1, 2, 200.0),
]


def curve(**fields: object) -> Curve:
    return Curve("title", "distinct adapters", "2026-01-01T00:00:00+00:00", {}, SAMPLES, **fields)


def test_medians_and_extremes_over_the_rounds() -> None:
    assert curve().points == [1, 64]
    assert curve().over_rounds(1, lambda one: one.tokens_per_s) == Spread(200.0, 100.0, 300.0)
    assert str(Spread(200.0, 100.0, 300.0)) == "200 [100-300]"
    assert str(Spread(1.2345, 1.2345, 1.2345)) == "1.23"


def test_rows_with_a_floor() -> None:
    table = {name: cells for name, *cells in rows(curve(floors=FLOORS, machine=Machine(1e9, 1e12)))}
    assert table["distinct adapters"] == ["1", "64"]
    assert table["output tokens/s"] == ["200 [100-300]", "35 [20-50]"]
    assert table["inter-token p50, ms"] == ["10", "10"]
    assert table["read by a step, MB"] == ["10", "73"]
    assert table["share of the floor"] == ["50%", "64%"]


def test_rows_without_a_floor() -> None:
    assert not any("floor" in name for name, *_ in rows(curve()))


def test_failed_requests_are_counted() -> None:
    assert curve().failed == 0
    assert msgspec.structs.replace(curve(), samples=[sample(1, 0, 1.0, 2), sample(1, 1, 1.0, 1)]).failed == 3


@pytest.mark.parametrize("floors", [FLOORS, {}])
def test_files(floors: dict[int, Floor], tmp_path: Path) -> None:
    whole = curve(floors=floors, machine=Machine(1e9, 1e12))
    write_curve(tmp_path / "out", whole)
    assert msgspec.json.decode((tmp_path / "out" / "curve.json").read_bytes(), type=Curve) == whole
    assert "| output tokens/s | 200 [100-300] |" in (tmp_path / "out" / "curve.md").read_text()
    for name in ("tokens_per_s", "ttft"):
        png = (tmp_path / "out" / f"{name}.png").read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        assert png.startswith(b"\x89PNG")
        assert (width, height) == (960, 540)
