from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from load_tests.__main__ import app
from load_tests.fairness import LOUD, STEADY, Fairness, asks_of, simulate


@pytest.fixture(scope="module")
def result() -> Fairness:
    return simulate([1.0, 10.0], places=16, seconds=60.0, utilisation=0.9)


def test_a_loud_tenant_moves_a_steady_ones_p99_by_less_than_a_third(result: Fairness) -> None:
    """Simulated seconds: the same on any machine."""
    assert result.moved("fair") <= 1.3
    assert result.moved("fcfs") > 10


def test_fairness_costs_no_throughput(result: Fairness) -> None:
    speeds = {point.policy: point.output_tokens_per_s for point in result.points if point.load == 10}
    assert speeds["fair"] > 0.97 * speeds["fcfs"]


def test_what_one_tenant_asks_does_not_depend_on_the_other() -> None:
    calm, busy = (asks_of({STEADY: 5.0, LOUD: rate}, 20.0, seed=3) for rate in (1.0, 50.0))
    assert [ask for ask in calm if ask.tenant == STEADY] == [ask for ask in busy if ask.tenant == STEADY]
    assert [ask.at for ask in busy] == sorted(ask.at for ask in busy)
    assert 700 < sum(ask.tenant == LOUD for ask in busy) < 1300


def test_the_command_writes_tables_and_plots(tmp_path: Path) -> None:
    command = ["fairness", "--out", str(tmp_path), "--seconds", "5", "--loads", "1,4"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.iterdir()} == {"simulated.json", "simulated.md", "simulated.png"}
    assert "fair: p99 moved by" in done.output
