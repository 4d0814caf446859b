"""What `tests/gpu/conftest.py` does around each test, on a device that is only said to be one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import test_lora_kernels
from tests.gpu.conftest import SMOKE
from tests.gpu.errors import poison_free_memory

ROOT = Path(__file__).resolve().parents[2]
DEVICE = """
import torch
from tests.gpu import conftest

HERE = __import__("pathlib").Path(__file__).parent
spoiled = False

def synchronize():
    if spoiled:
        raise torch.AcceleratorError("an illegal memory access was encountered")

torch.cuda.is_available = lambda: True
torch.cuda.synchronize = synchronize
torch.cuda.empty_cache = lambda: (HERE / "memory given back").touch()
conftest.HERE = HERE
globals().update({name: value for name, value in vars(conftest).items() if not name.startswith("__")})
"""
TESTS = """
import conftest

def test_fails():
    assert conftest.__file__ == "somewhere"

def test_spoils_the_device():
    conftest.spoiled = True

def test_never_comes():
    pass
"""
COLLECT = """
import json, pytest

class Marks:
    def pytest_collection_finish(self, session):
        marks = {name: [] for name in ("smoke", "alone", "extra")}
        for item in session.items:
            for mark in marks.keys() & {mark.name for mark in item.iter_markers()}:
                marks[mark].append(item.nodeid)
        self.found = marks | {"all": [item.nodeid for item in session.items]}

marks = Marks()
pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu"], plugins=[marks])
print("", json.dumps(marks.found), sep="\\n")
"""


def test_a_test_that_spoils_the_device_ends_its_process(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(DEVICE)
    (tmp_path / "test_device.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "test_spoils_the_device spoiled the device: an illegal memory access" in done.stderr
    assert "test_fails FAILED" in done.stdout  # a plain failure ends nothing
    assert "test_never_comes" not in done.stdout
    assert (tmp_path / "memory given back").exists()


@pytest.fixture(scope="module")
def marked() -> dict[str, list[str]]:
    """The tests of `tests/gpu` by mark, and all of them."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_every_case_of_the_smoke_run_exists(marked: dict[str, list[str]]) -> None:
    wanted = {f"tests/gpu/{file}::{name}" for file, names in SMOKE.items() for name in names}
    assert set(marked["smoke"]) == wanted


def test_what_is_left_out_is_said_by_another_case(marked: dict[str, list[str]]) -> None:
    assert len(marked["extra"]) > 50
    for test in marked["extra"]:
        assert test.replace("float16", "bfloat16") in marked["all"]
        assert test not in marked["smoke"]


def test_gpt_oss_has_a_process_of_its_own(marked: dict[str, list[str]]) -> None:
    assert marked["alone"] == [test for test in marked["all"] if "gpt_oss" in test]


def test_memory_for_six_workers_is_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What poisoning takes of 80 GB leaves room for contexts and references in float64."""
    taken: list[int] = []
    monkeypatch.setattr(torch, "full", lambda shape, value, device: taken.append(4 * shape[0]))
    poison_free_memory()
    assert 6 * sum(taken) < 12 * 2**30
    assert max(taken) == 2**30


def test_too_little_memory_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a test that is skipped and missed by nobody."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7 * 2**30, 80 * 2**30))
    with pytest.raises(AssertionError, match=r"needs 8 GiB of free memory, there are 7\.0"):
        test_lora_kernels.test_arena_past_two_to_the_31_elements()
