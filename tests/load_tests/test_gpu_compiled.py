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
CASES = [
    "lora rows bf16",
    "lora tiles bf16",
    "decode bf16, split",
    "mixed bf16",
    "layer bf16",
    "layer bf16, widest",
]
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
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    if not (runs("ptxas") and runs("cuobjdump")):
        pytest.skip("Triton's ptxas and cuobjdump do not run here")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *CASES], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_fits_the_chip(compiled: dict[str, list[dict[str, Any]]]) -> None:
    kernels = [kernel for case in compiled.values() for kernel in case]
    assert {kernel["kernel"] for kernel in kernels} == {
        "_shrink_rows", "_expand_rows", "_shrink_tiles", "_expand_tiles", "_write", "_attend", "_join",
        "_add_norm", "_norm_rotate", "_activate"
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
    assert by_case["lora tiles bf16"]["_shrink_tiles"]["HGMMA"] > 0
    assert by_case["lora tiles bf16"]["_expand_tiles"]["HGMMA"] > 0
    assert by_case["mixed bf16"]["_attend"]["HGMMA"] > 0
    assert by_case["decode bf16, split"]["_attend"]["HMMA"] > 0
    for name in ("_shrink_rows", "_expand_rows"):
        assert by_case["lora rows bf16"][name]["LD.128"] > 0
    for name in ("_add_norm", "_norm_rotate", "_activate"):
        assert by_case["layer bf16"][name]["LD.128"] > 0
