"""Every Triton kernel compiles for Hopper, without a GPU. In a process of its own: this one interprets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = 227 * 1024  # bytes that a program may have on sm_90
# Launched so that each kernel waits for the one before, which adds two instructions to it
DEPENDENT = [
    "lora rows bf16, dependent",
    "lora tiles bf16, dependent",
    "decode bf16, dependent",
    "layer bf16, dependent",
]
CASES = [
    *DEPENDENT,
    "mixed bf16",
    "layer bf16, widest",
    "sampling bf16",
    "sampling fp32, whole",
]
# The most kernels that a model may compile, at start and for larger steps: 1 or 2 s each on a card.
MOST = {"llama-3.1-8b": (18, 2), "qwen2.5-0.5b": (18, 2)}
MOST_TINY = (30, 2)
COUNTS = """
import json
from load_tests.gpu.warmup import MODELS, TINY, decode, kernels, prompts
found = {}
for name, model in (MODELS | TINY).items():
    at_start = kernels(decode(model))
    found[name] = len(at_start), len(kernels(prompts(model)) - at_start)
print(json.dumps(found))
"""
STARTS = """
import json
from dataclasses import asdict
from load_tests.gpu.warmup import MODELS, TINY, compiled, decode
models = {"llama-3.1-8b": MODELS["llama-3.1-8b"], "gemma2": TINY["gemma2"]}
print(json.dumps({name: [asdict(one) for one in compiled(decode(models[name]))] for name in models}))
"""
SCRIPT = """
import json, sys
from dataclasses import asdict
from load_tests.gpu.compiled import CASES, compile_only, read
found = {name: [asdict(read(kernel)) for kernel in compile_only(CASES[name])] for name in sys.argv[1:]}
print(json.dumps(found))
"""


def runs(tool: str) -> bool:
    try:
        return subprocess.run([TOOLS / tool, "--version"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (runs("ptxas") and runs("cuobjdump")):
        pytest.skip("Triton's ptxas and cuobjdump do not run here")
    return tmp_path_factory.mktemp("triton")


def found_by(script: str, *arguments: str, cache: Path | None = None) -> Any:
    environment = dict(os.environ) if cache is None else {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(cache: Path) -> dict[str, list[dict[str, Any]]]:
    return found_by(SCRIPT, *CASES, cache=cache)


def test_every_kernel_fits_the_chip(compiled: dict[str, list[dict[str, Any]]]) -> None:
    kernels = [kernel for case in compiled.values() for kernel in case]
    assert {kernel["kernel"] for kernel in kernels} == {
        "shrink_rows", "expand_rows", "shrink_tiles", "expand_tiles", "write", "attend", "join",
        "_add_norm", "_norm_rotate", "_rotate_write", "_activate", "_argmax", "_draw"
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["stack"] == 0, f"{kernel} spills registers"
        assert kernel["shared"] <= SHARED_MEMORY


def test_tiles_use_the_tensor_cores(compiled: dict[str, list[dict[str, Any]]]) -> None:
    """wgmma where tiles are tall enough for it, mma for decode's 16 rows; weights move 16 bytes a thread."""
    by_case = {
        case: {kernel["kernel"]: kernel["instructions"] for kernel in kernels}
        for case, kernels in compiled.items()
    }
    assert by_case["lora tiles bf16, dependent"]["shrink_tiles"]["HGMMA"] > 0
    assert by_case["lora tiles bf16, dependent"]["expand_tiles"]["HGMMA"] > 0
    assert by_case["mixed bf16"]["attend"]["HGMMA"] > 0
    assert by_case["decode bf16, dependent"]["attend"]["HMMA"] > 0
    for name in ("shrink_rows", "expand_rows"):
        assert by_case["lora rows bf16, dependent"][name]["LD.128"] > 0
    for name in ("_add_norm", "_norm_rotate", "_rotate_write", "_activate"):
        assert by_case["layer bf16, dependent"][name]["LD.128"] > 0
    for name in ("_argmax", "_draw"):
        assert by_case["sampling bf16"][name]["LD.128"] > 0


def test_copies_of_several_steps_are_under_way(compiled: dict[str, list[dict[str, Any]]]) -> None:
    """Attention has three buffers of 64 keys and values of 128 numbers in bfloat16, beside the query."""
    for case in ("decode bf16, dependent", "mixed bf16"):
        (attend,) = [kernel for kernel in compiled[case] if kernel["kernel"] == "attend"]
        assert attend["shared"] >= 3 * 2 * 64 * 128 * 2, case


def test_only_dependent_kernels_wait_for_the_one_before(compiled: dict[str, list[dict[str, Any]]]) -> None:
    for case, kernels in compiled.items():
        for kernel in kernels:
            assert (kernel["instructions"]["waits"] > 0) is (case in DEPENDENT), (case, kernel["kernel"])
            assert kernel["instructions"]["early"] == 0, "it reads what the kernel before may still write"


def test_a_start_compiles_few_kernels() -> None:
    """Each takes a second or two of a start, and of the first large steps."""
    for name, (at_start, later) in found_by(COUNTS).items():
        most_at_start, most_later = MOST.get(name, MOST_TINY)
        assert 10 < at_start <= most_at_start, name
        assert later <= most_later, name


def test_all_that_a_start_compiles_fits_the_chip(cache: Path) -> None:
    """Of a real model, and of a tiny one as in tests/gpu."""
    for name, kernels in found_by(STARTS, cache=cache).items():
        for kernel in kernels:
            assert kernel["shared"] <= SHARED_MEMORY, name
            assert kernel["stack"] == 0, f"{name}: {kernel} spills registers"
