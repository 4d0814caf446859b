"""What a decoder layer computes between its matrix products on CUDA, in Triton.

As torch operations each of these is several launches, and its rows pass through memory in each. One program
takes one token here, reads its row once and sums in float32; results are rounded once, where they are stored.

Grids follow from shapes alone, and nothing is read back to the host: a CUDA graph can capture all of it.

Shape suffixes: T tokens, N rows that are kept of them, W the width of a row, H heads, P pairs of values that
are rotated together, C the values of a head after those, I the intermediate size.
"""

# Triton kernels have no Python types to state, and `triton.jit` is untyped:
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from server.devices.cuda.jit import after_the_last, jit, kernel, launch_options, power_of_2, tl
from server.model.attention.interface import LayerCache
from server.model.decoder_layers import Tables
from server.model.layer_reader import Activation, Norm


@jit()
def _normed(x_W, weight, eps, mask_W, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """RMSNorm of one row, zero where masked."""
    weight_W = tl.load(weight + tl.arange(0, BLOCK), mask=mask_W, other=0.0)
    return x_W * tl.rsqrt(tl.sum(x_W * x_W, axis=0) / WIDTH + eps) * weight_W


@kernel()
def _add_norm(
    x, residual, out, rows, x_weight, weight, multiplier, x_eps, eps,
    WIDTH: tl.constexpr, BEGIN: tl.constexpr, ROWS: tl.constexpr, X_NORM: tl.constexpr, NORM: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """residual += multiplier * norm(x); out = norm(residual). Grid (T,), or (N,) over `rows`."""
    if PDL:
        after_the_last()
    row = tl.program_id(0).to(tl.int64)
    token = row
    if ROWS:
        token = tl.load(rows + row)
    w_W = tl.arange(0, BLOCK)
    mask_W = w_W < WIDTH
    sum_W = tl.load(x + token * WIDTH + w_W, mask=mask_W, other=0.0).to(tl.float32)
    if X_NORM:
        sum_W = _normed(sum_W, x_weight, x_eps, mask_W, WIDTH, BLOCK)
    sum_W *= multiplier
    if not BEGIN:
        sum_W += tl.load(residual + token * WIDTH + w_W, mask=mask_W, other=0.0)
    if not ROWS:  # the end: nothing is added any more, and a row may be asked for twice
        tl.store(residual + token * WIDTH + w_W, sum_W, mask=mask_W)
    if NORM:
        sum_W = _normed(sum_W, weight, eps, mask_W, WIDTH, BLOCK)
    tl.store(out + row * WIDTH + w_W, sum_W.to(out.dtype.element_ty), mask=mask_W)


@jit()
def _turned(
    at_H, h_H, heads, is_k, place, cos, sin, weight, eps,
    Q_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, PER_HEAD: tl.constexpr,
    REST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Heads of Q or K from `at_H`, normed and rotated: HALF values, their HALF partners and, if REST, those
    that are not rotated, which a norm wants too.

    Each is loaded once, and what takes its place is computed from it: no thread can find it overwritten.
    """
    p_P, c_C = tl.arange(0, BLOCK_P)[None, :], tl.arange(0, BLOCK_C)[None, :]
    mask_HP = (h_H < heads) & (p_P < HALF)
    mask_HC = (h_H < heads) & (c_C < DIM - 2 * HALF) & REST
    a_HP = tl.load(at_H + p_P, mask=mask_HP, other=0.0).to(tl.float32)
    b_HP = tl.load(at_H + HALF + p_P, mask=mask_HP, other=0.0).to(tl.float32)
    c_HC = tl.load(at_H + 2 * HALF + c_C, mask=mask_HC, other=0.0).to(tl.float32)
    if NORM:
        squares_H = tl.sum(a_HP * a_HP + b_HP * b_HP, axis=1) + tl.sum(c_HC * c_HC, axis=1)
        if PER_HEAD:
            scale_H = tl.rsqrt(squares_H / DIM + eps)[:, None]
            weight_H = weight + is_k * DIM + h_H * 0
        else:
            scale_H = tl.rsqrt(tl.sum(squares_H, axis=0) / (heads * DIM) + eps)
            weight_H = weight + is_k * (Q_HEADS * DIM) + h_H * DIM
        a_HP *= scale_H * tl.load(weight_H + p_P, mask=mask_HP, other=0.0)
        b_HP *= scale_H * tl.load(weight_H + HALF + p_P, mask=mask_HP, other=0.0)
        c_HC *= scale_H * tl.load(weight_H + 2 * HALF + c_C, mask=mask_HC, other=0.0)
    if HALF > 0:
        mask_P = p_P < HALF
        cos_a_P = tl.load(cos + place + p_P, mask=mask_P, other=0.0).to(tl.float32)
        cos_b_P = tl.load(cos + place + HALF + p_P, mask=mask_P, other=0.0).to(tl.float32)
        sin_a_P = tl.load(sin + place + p_P, mask=mask_P, other=0.0).to(tl.float32)
        sin_b_P = tl.load(sin + place + HALF + p_P, mask=mask_P, other=0.0).to(tl.float32)
        rotated_HP = a_HP * cos_a_P - b_HP * sin_a_P
        b_HP = b_HP * cos_b_P + a_HP * sin_b_P
        a_HP = rotated_HP
    return a_HP, b_HP, c_HC


@jit()
def _put(
    to_H, h_H, heads, a_HP, b_HP, c_HC,
    DIM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What `_turned` gave, rounded."""
    p_P, c_C = tl.arange(0, BLOCK_P)[None, :], tl.arange(0, BLOCK_C)[None, :]
    mask_HP = (h_H < heads) & (p_P < HALF)
    tl.store(to_H + p_P, a_HP.to(to_H.dtype.element_ty), mask=mask_HP)
    tl.store(to_H + HALF + p_P, b_HP.to(to_H.dtype.element_ty), mask=mask_HP)
    if REST:
        mask_HC = (h_H < heads) & (c_C < DIM - 2 * HALF)
        tl.store(to_H + 2 * HALF + c_C, c_HC.to(to_H.dtype.element_ty), mask=mask_HC)


@kernel()
def _norm_rotate(
    qkv, cos, sin, positions, weight, eps,
    WIDTH: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, NORM: tl.constexpr, PER_HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norms and rotates the heads of one token in place; grid (T, 2): Q, then K."""
    if PDL:
        after_the_last()
    token, is_k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.where(is_k == 1, K_HEADS, Q_HEADS)
    h_H = tl.arange(0, BLOCK_H)[:, None]
    at_H = qkv + token * WIDTH + is_k * (Q_HEADS * DIM) + h_H * DIM
    place = tl.load(positions + token) * (2 * HALF)
    a_HP, b_HP, c_HC = _turned(
        at_H, h_H, heads, is_k, place, cos, sin, weight, eps,
        Q_HEADS, DIM, HALF, NORM, PER_HEAD, NORM, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    _put(at_H, h_H, heads, a_HP, b_HP, c_HC, DIM, HALF, NORM, BLOCK_P, BLOCK_C)


@kernel()
def _rotate_write(
    qkv, cos, sin, positions, weight, eps, k_cache, v_cache, slot_mapping,
    k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n,
    WIDTH: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, NORM: tl.constexpr, PER_HEAD: tl.constexpr,
    V_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """As `_norm_rotate` for Q; K goes into the cache alone, and V with it. Grid (T, 3): Q, K, V."""
    if PDL:
        after_the_last()
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    is_k = tl.minimum(part, 1)
    slot = tl.load(slot_mapping + token)
    if part > 0 and slot < 0:
        return
    block, n = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    h_H = tl.arange(0, BLOCK_H)[:, None]
    if part == 2:
        e_E = tl.arange(0, BLOCK_E)[None, :]
        mask_HE = (h_H < K_HEADS) & (e_E < V_DIM)
        from_H = qkv + token * WIDTH + (Q_HEADS + K_HEADS) * DIM + h_H * V_DIM
        v_HE = tl.load(from_H + e_E, mask=mask_HE)
        to_H = v_cache + block * v_stride_b + h_H * v_stride_h + n * v_stride_n
        tl.store(to_H + e_E, v_HE, mask=mask_HE)
        return
    heads = tl.where(is_k == 1, K_HEADS, Q_HEADS)
    at_H = qkv + token * WIDTH + is_k * (Q_HEADS * DIM) + h_H * DIM
    place = tl.load(positions + token) * (2 * HALF)
    a_HP, b_HP, c_HC = _turned(
        at_H, h_H, heads, is_k, place, cos, sin, weight, eps,
        Q_HEADS, DIM, HALF, NORM, PER_HEAD, True, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    if part == 0:
        _put(at_H, h_H, heads, a_HP, b_HP, c_HC, DIM, HALF, NORM, BLOCK_P, BLOCK_C)
    else:
        to_H = k_cache + block * k_stride_b + h_H * k_stride_h + n * k_stride_n
        _put(to_H, h_H, heads, a_HP, b_HP, c_HC, DIM, HALF, True, BLOCK_P, BLOCK_C)


@kernel()
def _activate(
    gate_up, out, WIDTH: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """out = activation(gate) * up; grid (T, blocks of the intermediate size)."""
    if PDL:
        after_the_last()
    token = tl.program_id(0).to(tl.int64)
    i_I = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_I = i_I < WIDTH
    at_I = gate_up + token * (2 * WIDTH) + i_I
    gate_I = tl.load(at_I, mask=mask_I, other=0.0).to(tl.float32)
    up_I = tl.load(at_I + WIDTH, mask=mask_I, other=0.0).to(tl.float32)
    y_I = gate_I
    if GELU:  # 0.5 (1 + tanh(z)) = sigmoid(2z), z = sqrt(2 / pi) (x + 0.044715 x^3)
        y_I *= 1.5957691216057308 * (1.0 + 0.044715 * gate_I * gate_I)
    out_I = gate_I / (1.0 + tl.exp(-y_I)) * up_I  # where exp is inf, 0
    tl.store(out + token * WIDTH + i_I, out_I.to(out.dtype.element_ty), mask=mask_I)


def add_norm(
    x_TW: torch.Tensor,
    residual_TW: torch.Tensor,
    norm: Norm | None,
    *,
    x_norm: Norm | None = None,
    multiplier: float = 1.0,
    begin: bool = False,
    rows_N: torch.Tensor | None = None,
    dependent: bool = False,
) -> torch.Tensor:
    """residual += multiplier * x_norm(x) in place -> norm(residual) [T, W], in the dtype of x.

    x: [T, W] contiguous; residual: [T, W] float32 contiguous; a norm that is None is left out. `begin`: the
    residual holds nothing yet and becomes x. `rows_N`: int64 [N], the tokens that are wanted -> [N, W]; the
    residual is then left as it was. `dependent`: see `Levers.dependent_launch`, here and below.
    """
    tokens, width = x_TW.shape
    out = x_TW.new_empty(tokens if rows_N is None else rows_N.numel(), width)
    block = power_of_2(width)
    _add_norm[(len(out),)](
        x_TW, residual_TW, out, x_TW if rows_N is None else rows_N,
        residual_TW if x_norm is None else x_norm.weight, residual_TW if norm is None else norm.weight,
        float(multiplier), 0.0 if x_norm is None else x_norm.eps, 0.0 if norm is None else norm.eps,
        WIDTH=width, BEGIN=begin, ROWS=rows_N is not None, X_NORM=x_norm is not None, NORM=norm is not None,
        BLOCK=block, num_warps=_warps(block), **launch_options(dependent=dependent),
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm of Q and K: of each head alone (Qwen 3), or of all heads of Q, and of K, at once (OLMo 2)."""

    weight: torch.Tensor  # float32, Q's values and then K's: of one head each, or of all their heads
    eps: float
    per_head: bool


def norm_rotate(
    qkv_TW: torch.Tensor,
    heads: int,
    kv_heads: int,
    dim: int,
    norm: HeadNorm | None,
    tables: Tables | None,
    positions_T: torch.Tensor,
    *,
    dependent: bool = False,
) -> None:
    """Norms, then rotates (Su et al. 2021) Q and K in place; what has neither is left as it is.

    qkv: [T, W] contiguous, of which the first `heads * dim` values are Q and the next `kv_heads * dim` K.
    `tables`: cos and sin, each [positions, rotary_dim] contiguous, for the leading rotary_dim values of each
    head, of which value j is rotated with value j + rotary_dim / 2. `positions_T`: int64 [T], rows of the
    tables.
    """
    if norm is None and tables is None:
        return
    _norm_rotate[(qkv_TW.shape[0], 2)](
        qkv_TW, *(tables or (qkv_TW, qkv_TW)), positions_T, *_weight(norm, qkv_TW),
        **_turn(qkv_TW.shape[1], heads, kv_heads, dim, _rotary_dim(tables), norm and norm.per_head),
        **launch_options(dependent=dependent),
    )  # fmt: skip


def rotate_write(
    qkv_TW: torch.Tensor,
    cache: LayerCache,
    slots_T: torch.Tensor,
    norm: HeadNorm | None,
    tables: Tables | None,
    positions_T: torch.Tensor,
    *,
    dependent: bool = False,
) -> None:
    """As `norm_rotate` for Q; K, after the same, and V go into a `paged_cache`, at the slots int64 [T].

    qkv: [T, W] contiguous, Q, K and V side by side; what is left in K's place is not to be read. A token
    whose slot is negative goes nowhere.
    """
    spec = cache.spec
    turn = _turn(
        qkv_TW.shape[1], spec.num_heads, spec.num_kv_heads, spec.k_head_dim,
        _rotary_dim(tables), norm and norm.per_head,
    )  # fmt: skip
    _rotate_write[(qkv_TW.shape[0], 3)](
        qkv_TW, *(tables or (qkv_TW, qkv_TW)), positions_T, *_weight(norm, qkv_TW),
        cache.k, cache.v, slots_T, *cache.k.stride()[:3], *cache.v.stride()[:3],
        V_DIM=spec.v_head_dim, BLOCK_SIZE=cache.k.shape[2], BLOCK_E=power_of_2(spec.v_head_dim),
        **turn, **launch_options(dependent=dependent),
    )  # fmt: skip


def _rotary_dim(tables: Tables | None) -> int:
    return 0 if tables is None else tables[0].shape[1]


def _weight(norm: HeadNorm | None, other: torch.Tensor) -> tuple[torch.Tensor, float]:
    """And epsilon; where there is no norm, any tensor."""
    return (other, 0.0) if norm is None else (norm.weight, norm.eps)


@cache
def _turn(
    width: int, heads: int, kv_heads: int, dim: int, rotary_dim: int, per_head: bool | None
) -> Mapping[str, int]:
    """Constants of the kernels that rotate; `per_head` is of the norm, None: there is none."""
    block_h = power_of_2(max(heads, kv_heads))
    return {
        "WIDTH": width,
        "Q_HEADS": heads,
        "K_HEADS": kv_heads,
        "DIM": dim,
        "HALF": rotary_dim // 2,
        "NORM": per_head is not None,
        "PER_HEAD": bool(per_head),
        "BLOCK_H": block_h,
        "BLOCK_P": power_of_2(max(1, rotary_dim // 2)),
        "BLOCK_C": power_of_2(max(1, dim - rotary_dim)),
        "num_warps": _warps(block_h * power_of_2(dim)),
    }


def activate(gate_up_TW: torch.Tensor, activation: Activation, *, dependent: bool = False) -> torch.Tensor:
    """activation(gate) * up (Shazeer 2020): [T, 2 * I] contiguous, gate then up -> [T, I]."""
    tokens, width = gate_up_TW.shape[0], gate_up_TW.shape[1] // 2
    out_TI = gate_up_TW.new_empty(tokens, width)
    block = min(1024, power_of_2(width))
    _activate[(tokens, -(-width // block))](
        gate_up_TW,
        out_TI,
        WIDTH=width,
        GELU=activation == "gelu",
        BLOCK=block,
        **launch_options(dependent=dependent),
    )
    return out_TI


def _warps(values: int) -> int:
    """Warps of a program that holds so many values: sixteen a thread, which is two loads of 16 bytes."""
    return min(16, max(1, values // 512))
