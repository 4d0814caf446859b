"""The kernels between a layer's matrix products on CUDA against float64, at the sizes of real models."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from server.devices.cuda.layer_kernels import HeadNorm, activate, add_norm, norm_rotate, rotate_write
from server.model.attention.interface import LayerCacheSpec, paged_cache
from server.model.layer_reader import Activation, Norm
from tests.gpu.errors import assert_near, poison_free_memory

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
# float16 goes the way of bfloat16 in the kernels with many cases.
WIDE_DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.extra), torch.float32], ids=str
)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


def a_norm(width: int) -> Norm:
    return Norm(1 + randn(width) / 4, 1e-5)


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In float64, over the last dimension."""
    return functional.rms_norm(x.double(), x.shape[-1:], weight.double(), eps)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 64, 2000])
@pytest.mark.parametrize("width", [896, 3000, 4096, 16384])
def test_add_norm(width: int, tokens: int, dtype: torch.dtype) -> None:
    x, residual = randn(tokens, width).to(dtype), randn(tokens, width)
    norm, x_norm = a_norm(width), a_norm(width)
    rows = torch.randint(tokens, (7,), device="cuda")
    want = residual.double() + 0.7 * normed(x, x_norm.weight, x_norm.eps)
    want_out = normed(want, norm.weight, norm.eps)
    poison_free_memory()
    chosen = add_norm(x, residual, norm, x_norm=x_norm, multiplier=0.7, rows_N=rows)
    assert_near(chosen, want_out[rows], dtype)
    out = add_norm(x, residual, norm, x_norm=x_norm, multiplier=0.7)
    assert_near(residual, want, torch.float32)
    assert_near(out, want_out, dtype)


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("per_head", [None, True], ids=["no norm", "per head"])
def test_what_is_rotated_is_written(per_head: bool | None, dependent: bool) -> None:
    """Bit by bit what `norm_rotate` gives, each token at its slot."""
    spec, tokens = LayerCacheSpec(8, 128, 128, 32), 200
    qkv = randn(tokens, 48 * 128).bfloat16()
    norm = None if per_head is None else HeadNorm(1 + randn(256) / 4, 1e-5, per_head)
    cos, sin = randn(300, 128).bfloat16(), randn(300, 128).bfloat16()
    positions = torch.randint(300, (tokens,), device="cuda")
    slots = torch.randperm(16 * 20, device="cuda")[:tokens]
    want = qkv.clone()
    norm_rotate(want, 32, 8, 128, norm, (cos, sin), positions)
    cache = paged_cache(spec, 20, 16, torch.bfloat16, qkv.device)
    poison_free_memory()
    for _ in range(20):  # one kernel after the other, as the branches of a race would have it
        again = qkv.clone()
        rotate_write(again, cache, slots, norm, (cos, sin), positions, dependent=dependent)
    query, key, value = spec.split(want)
    assert torch.equal(spec.split(again)[0], query)
    assert torch.equal(cache.k.transpose(1, 2).flatten(0, 1)[slots], key)
    assert torch.equal(cache.v.transpose(1, 2).flatten(0, 1)[slots], value)


@WIDE_DTYPES
@pytest.mark.parametrize("tokens", [1, 64, 2000])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary_dim"),
    [(32, 8, 128, 128), (14, 2, 64, 64), (24, 8, 128, 96), (8, 4, 256, 256), (32, 32, 80, 32)],
)
@pytest.mark.parametrize("per_head", [None, True, False], ids=["no norm", "per head", "all heads"])
def test_norm_rotate(
    heads: int,
    kv_heads: int,
    dim: int,
    rotary_dim: int,
    per_head: bool | None,
    tokens: int,
    dtype: torch.dtype,
) -> None:
    q_end, k_end = heads * dim, (heads + kv_heads) * dim
    qkv = randn(tokens, k_end + kv_heads * dim).to(dtype)
    tables = randn(4096, rotary_dim).to(dtype), randn(4096, rotary_dim).to(dtype)
    positions = torch.randint(4096, (tokens,), device="cuda")
    before = qkv.double()
    parts = [before[:, :q_end].view(tokens, heads, dim), before[:, q_end:k_end].view(tokens, kv_heads, dim)]
    norm = None
    if per_head is not None:
        weights = [1 + randn(dim if per_head else part[0].numel()) / 4 for part in parts]
        norm = HeadNorm(torch.cat(weights), 1e-5, per_head)
        parts = [
            normed(part if per_head else part.flatten(1), weight, 1e-5).view_as(part)
            for part, weight in zip(parts, weights, strict=True)
        ]
    cos, sin = (table.double()[positions][:, None] for table in tables)
    want = []
    for part in parts:
        x, half = part[..., :rotary_dim], rotary_dim // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        want.append(torch.cat([x * cos + turned * sin, part[..., rotary_dim:]], dim=-1).flatten(1))
    norm_rotate(qkv, heads, kv_heads, dim, norm, tables, positions)
    assert_near(qkv[:, :k_end], torch.cat(want, dim=1), dtype)
    assert torch.equal(qkv[:, k_end:].double(), before[:, k_end:])


@WIDE_DTYPES
@pytest.mark.parametrize("tokens", [1, 64, 2000])
@pytest.mark.parametrize("width", [896, 3000, 14336])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activate(activation: Activation, width: int, tokens: int, dtype: torch.dtype) -> None:
    gate_up = (3 * randn(tokens, 2 * width)).to(dtype)
    gate_up[0, :2] = torch.tensor([-200.0, 200.0])  # exp leaves float32
    gate, up = gate_up.double().chunk(2, dim=1)
    want = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    poison_free_memory()
    assert_near(activate(gate_up, activation), want * up, dtype)
