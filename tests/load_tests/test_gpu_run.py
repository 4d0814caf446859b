"""The one call for a machine with a GPU: its parts exist, and fit into its time together."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

RUN = Path(__file__).resolve().parents[2] / "load_tests" / "gpu" / "run.sh"
PARTS = re.findall(r"^(?:step|gpu) (\S+) (\d+) (.*)$", RUN.read_text(), re.MULTILINE)


def test_it_is_a_shell_script() -> None:
    assert subprocess.run(["bash", "-n", RUN], check=False).returncode == 0


def test_its_parts_fit_into_the_time_of_one_call() -> None:
    assert sum(int(seconds) for _, seconds, _ in PARTS) <= 450


def test_every_part_is_named_in_its_usage_and_exists() -> None:
    usage = re.search(r"run\.sh \[(.*) \.\.\.\]", RUN.read_text())
    assert usage is not None
    assert usage[1].split("|") == [name for name, _, _ in PARTS]
    modules = re.findall(r"^gpu \S+ \d+ (\S+)", RUN.read_text(), re.MULTILINE)
    assert {"engine", "swap", "sweep", "kernels"} <= set(modules)
    for module in modules:
        assert importlib.util.find_spec(f"load_tests.gpu.{module}") is not None


def test_measurements_stop_before_they_are_stopped() -> None:
    for name, seconds, command in PARTS:
        if own := re.search(r"--seconds (\d+)", command):
            assert int(own[1]) + 15 <= int(seconds), name
