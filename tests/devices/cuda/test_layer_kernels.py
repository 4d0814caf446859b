"""The Triton kernels between a layer's matrix products against plain torch, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from server.model.attention.interface import LayerCacheSpec, paged_cache
from server.model.layer_reader import Activation, Norm

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles here: tests/gpu runs these kernels", allow_module_level=True)

from server.devices.cuda.layer_kernels import (  # noqa: E402  (after the skip)
    HeadNorm,
    activate,
    add_norm,
    norm_rotate,
    rotate_write,
)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-5, atol=1e-5)


def a_norm(width: int, eps: float = 1e-3) -> Norm:
    return Norm(1 + torch.randn(width), eps)


def normed(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """In float64, over the last dimension."""
    x = x.double()
    if norm is None:
        return x
    return functional.rms_norm(x, x.shape[-1:], norm.weight.double(), norm.eps)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("width", [1, 32, 100, 129, 2000])
@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("with_x_norm", [False, True], ids=["plain x", "x normed"])
def test_add_norm(width: int, with_norm: bool, with_x_norm: bool) -> None:
    x, residual = torch.randn(3, width), torch.randn(3, width)
    norm, x_norm = a_norm(width) if with_norm else None, a_norm(width, 0.1) if with_x_norm else None
    want = residual.double() + 0.7 * normed(x, x_norm)
    got = add_norm(x, residual, norm, x_norm=x_norm, multiplier=0.7)
    close(residual, want)
    close(got, normed(want, norm))


def test_the_residual_begins_as_x() -> None:
    x, norm, residual = torch.randn(4, 60), a_norm(60), torch.full((4, 60), torch.nan)
    got = add_norm(x, residual, norm, begin=True)
    assert torch.equal(residual, x)
    close(got, normed(x, norm))


@pytest.mark.parametrize("rows", [[2], [4, 0, 4], []])
def test_only_the_rows_asked_for(rows: list[int]) -> None:
    """Also twice the same one, as the padded rows of a graph are."""
    x, residual, norm = torch.randn(5, 33), torch.randn(5, 33), a_norm(33)
    before = residual.clone()
    got = add_norm(x, residual, norm, multiplier=0.5, rows_N=torch.tensor(rows, dtype=torch.int64))
    close(got, normed(before.double() + 0.5 * x, norm)[rows])
    assert torch.equal(residual, before)


def rotated(x_THD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor) -> torch.Tensor:
    """transformers' `apply_rotary_pos_emb` on the leading values."""
    width = cos_TR.shape[1]
    x, rest = x_THD[..., :width], x_THD[..., width:]
    turned = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], dim=-1)
    return torch.cat([x * cos_TR[:, None] + turned * sin_TR[:, None], rest], dim=-1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary_dim"),
    [(4, 2, 8, 8), (3, 1, 80, 80), (5, 5, 24, 12), (2, 1, 96, 64), (1, 1, 2, 2), (6, 2, 10, 0)],
)
@pytest.mark.parametrize("norm", ["none", "per head", "all heads"])
def test_norm_rotate(heads: int, kv_heads: int, dim: int, rotary_dim: int, norm: str) -> None:
    tokens, q_end, k_end = 3, heads * dim, (heads + kv_heads) * dim
    qkv = torch.randn(tokens, k_end + kv_heads * dim)
    cos, sin = torch.randn(2, 11, rotary_dim)  # halves unlike each other: each side has its own
    positions = torch.tensor([10, 0, 3])
    before = qkv.double()
    q, k = before[:, :q_end].view(tokens, heads, dim), before[:, q_end:k_end].view(tokens, kv_heads, dim)
    head_norm = None
    if norm == "per head":
        head_norm = HeadNorm(1 + torch.randn(2 * dim), 0.1, per_head=True)
        q, k = normed(q, Norm(head_norm.weight[:dim], 0.1)), normed(k, Norm(head_norm.weight[dim:], 0.1))
    elif norm == "all heads":
        head_norm = HeadNorm(1 + torch.randn(k_end), 0.1, per_head=False)
        q = normed(q.flatten(1), Norm(head_norm.weight[:q_end], 0.1)).view_as(q)
        k = normed(k.flatten(1), Norm(head_norm.weight[q_end:], 0.1)).view_as(k)
    q, k = (rotated(x, cos.double()[positions], sin.double()[positions]) for x in (q, k))
    tables = (cos, sin) if rotary_dim else None
    norm_rotate(qkv, heads, kv_heads, dim, head_norm, tables, positions)
    close(qkv, torch.cat([q.flatten(1), k.flatten(1), before[:, k_end:]], dim=1))


@pytest.mark.parametrize("rotary_dim", [0, 8, 12])
@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
def test_what_is_rotated_is_written(rotary_dim: int, with_norm: bool) -> None:
    """The same Q as `norm_rotate`'s, its K and V in the cache, a token without a place nowhere."""
    spec = LayerCacheSpec(num_kv_heads=2, k_head_dim=12, v_head_dim=10, num_heads=6)
    qkv = torch.randn(4, 6 * 12 + 2 * 12 + 2 * 10)
    norm = HeadNorm(1 + torch.randn(24), 0.1, per_head=True) if with_norm else None
    cos, sin = torch.randn(2, 11, rotary_dim)
    tables = (cos, sin) if rotary_dim else None
    positions, slots = torch.tensor([10, 0, 3, 5]), torch.tensor([13, -1, 2, 4])
    want = qkv.clone()
    norm_rotate(want, 6, 2, 12, norm, tables, positions)
    query, key, value = spec.split(want)
    cache = paged_cache(spec, 4, 4, torch.float32, torch.device("cpu"))
    rotate_write(qkv, cache, slots, norm, tables, positions)
    assert torch.equal(spec.split(qkv)[0], query)
    kept = slots >= 0
    for held, given in ((cache.k, key), (cache.v, value)):
        by_slot = held.transpose(1, 2).flatten(0, 1)  # [blocks * block_size, kv_heads, dim]
        assert torch.equal(by_slot[slots[kept]], given[kept])
        assert int((by_slot != 0).any(-1).any(-1).sum()) == 3, "and nothing elsewhere"


@pytest.mark.parametrize("width", [1, 56, 1024, 1500])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, in the interpreter
def test_activate(width: int, activation: Activation) -> None:
    gate_up = 3 * torch.randn(3, 2 * width)
    gate_up[0, 0], gate_up[1, 0] = -200.0, 200.0  # exp leaves float32
    gate, up = gate_up.double().chunk(2, dim=1)
    want = functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    close(activate(gate_up, activation), want * up)
