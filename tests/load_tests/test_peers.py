"""`make bench`'s script, around a benchmark that only notes how it is called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

RUN_PEERS = """
import os, sys
out = sys.argv[sys.argv.index("--out") + 1]
print(os.environ["CHORUS"], *sys.argv[1:], file=open(out, "a"))
"""
TABLE = "import sys; print('table of', open(sys.argv[1]).read())"


def run(bench: Path, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [ROOT / "load_tests" / "peers.sh", bench, out]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run_peers.py").write_text(RUN_PEERS)
    (tmp_path / "bench" / "table.py").write_text(TABLE)
    return tmp_path / "bench"


def test_both_models_by_default(bench: Path, tmp_path: Path) -> None:
    python = tmp_path / "peers" / "hf" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    done = run(bench, tmp_path / "out", PEERS=str(tmp_path / "peers"), TOTALS="W1=32")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "out").iterdir()
    for model in ("S", "M"):
        call = (folder / f"{model}.jsonl").read_text()
        assert call.startswith(f"{ROOT} --model {model} --peers chorus,")
        assert "--rounds 3 --total W1=32" in call
    assert (folder / "table.md").read_text().count("table of") == 2


def test_a_missing_benchmark_is_named(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere", tmp_path / "out")
    assert done.returncode == 2
    assert "nowhere has no run_peers.py" in done.stderr
    assert not (tmp_path / "out").exists()


def test_peers_that_are_not_built_are_named(bench: Path, tmp_path: Path) -> None:
    done = run(bench, tmp_path / "out", PEERS=str(tmp_path / "peers"))
    assert done.returncode == 2
    assert "setup.sh" in done.stderr
