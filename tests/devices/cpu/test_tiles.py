"""The AMX kernel on a processor that need not have AMX: its instructions are stood in for (amx.h)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import server.devices.cpu.native
from server.devices.cpu.linear import PackedLinear
from server.devices.cpu.native import library


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    best = library()
    if compiler is None or best is None or not any(name in best._name for name in ("_amx", "_avx512bf16")):
        pytest.skip("needs g++ and a processor with AVX-512 BF16")
    out = tmp_path_factory.mktemp("native") / "emulated.so"
    source = Path(server.devices.cpu.native.__file__).parent / "linear.cpp"
    flags = ["-O1", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-w", "-march=x86-64-v4", "-mavx512bf16"]
    subprocess.run([compiler, *flags, "-DCHORUS_AMX_EMULATED", str(source), "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 32), (32, 47), (576, 192), (192, 300), (33, 40)])
@pytest.mark.parametrize("tokens", [1, 5, 15, 16, 17, 31, 32, 33, 64, 96, 100, 130])
def test_equals_linear(emulated: ctypes.CDLL, bias: bool, n_in: int, n_out: int, tokens: int) -> None:
    torch.manual_seed(tokens)
    linear = nn.Linear(n_in, n_out, bias=bias, dtype=torch.bfloat16)
    x = torch.randn(tokens, n_in, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = nn.functional.linear(
            x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double()
        )
    got = PackedLinear(linear, emulated)(x)
    error = (got.double() - expected).norm() / expected.norm()
    assert error < 5e-3
