"""The CPU backend against dense attention in float64, over random ragged layouts."""

from __future__ import annotations

import pytest
import torch

from server.devices.cpu.attention import PagedCpuAttention, compiled_attention
from server.devices.cpu.native import libraries, library
from server.model.attention.interface import (
    AttentionBackend,
    AttentionOptions,
    AttentionPlan,
    LayerCache,
    LayerCacheSpec,
)
from server.model.attention.paged_reference import PagedReferenceAttention


def ragged_plan(
    generator: torch.Generator, query_lens: list[int], context_lens: list[int], block_size: int, blocks: int
) -> AttentionPlan:
    """Sequences whose blocks lie in random order; the last query_lens[s] tokens of each are this step's."""
    order = torch.randperm(blocks, generator=generator).tolist()
    widest = max(-(-n // block_size) for n in context_lens)
    tables = torch.full((len(query_lens), widest), -1, dtype=torch.int32)
    slots = []
    for s, (queries, length) in enumerate(zip(query_lens, context_lens, strict=True)):
        for b in range(-(-length // block_size)):
            tables[s, b] = order.pop()
        slots += [
            int(tables[s, p // block_size]) * block_size + p % block_size
            for p in range(length - queries, length)
        ]
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    return AttentionPlan(
        query_starts=starts,
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.tensor(slots),
        num_seqs=len(query_lens),
        max_query_len=max(query_lens),
        max_context_len=max(context_lens),
    )


def check(
    backend: AttentionBackend,
    dtype: torch.dtype,
    seed: int,
    *,
    heads: tuple[int, int],
    dims: tuple[int, int],
    block_size: int = 16,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # The last one starts 20 tokens before keys that only its later tokens see.
    query_lens = [1, 5, 1, 70, 1, 33, 40]
    context_lens = [1, 5, 37, 70, 150, 100, 84]
    blocks = sum(-(-n // block_size) for n in context_lens) + 3
    plan = ragged_plan(generator, query_lens, context_lens, block_size, blocks)
    tokens = sum(query_lens)
    # [T, H, d] views of [H, T, d] tensors, as transformers hands them over
    query, key, value = (
        random(n, tokens, d).to(dtype).transpose(0, 1)
        for n, d in ((heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]))
    )
    k_cache, v_cache = (random(blocks, heads[1], block_size, d).to(dtype) for d in dims)
    sink = random(heads[0]) if sinks else None
    options = AttentionOptions(0.21, window, softcap, sink)

    spec = LayerCacheSpec(heads[1], *dims, heads[0])
    wide = LayerCache(k_cache.double(), v_cache.double(), spec)
    expected = PagedReferenceAttention(torch.float64).forward(
        query.double(), key.double(), value.double(), wide, plan, options
    )
    cache = LayerCache(k_cache.clone(), v_cache.clone(), spec)
    got = backend.forward(query, key, value, cache, plan, options)
    assert got.shape == (tokens, heads[0], dims[1])
    assert got.is_contiguous()
    torch.testing.assert_close(cache.k, wide.k.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(cache.v, wide.v.to(dtype), rtol=0, atol=0)
    error = (got.double() - expected).norm() / expected.norm()
    assert error < (2e-6 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "dims", "block_size"),
    [((9, 3), (64, 64), 16), ((4, 4), (80, 80), 16), ((8, 1), (32, 48), 8), ((6, 2), (24, 24), 128)],
)
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"),
    [(None, None, False), (20, None, False), (None, 5.0, False), (None, None, True), (16, 3.0, True)],
)
def test_cpu_backend_equals_dense_attention(
    dtype: torch.dtype,
    heads: tuple[int, int],
    dims: tuple[int, int],
    block_size: int,
    window: int | None,
    softcap: float | None,
    sinks: bool,
) -> None:
    for lib in libraries():  # what another processor would run, too
        check(
            PagedCpuAttention(lib),
            dtype,
            seed=3,
            heads=heads,
            dims=dims,
            block_size=block_size,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )


def test_reference_without_compiled_kernels() -> None:
    check(PagedReferenceAttention(), torch.float32, seed=5, heads=(6, 2), dims=(32, 32), window=7)


def test_compiled_kernel_is_used_here() -> None:
    if library() is None:
        pytest.skip("no compiler on this machine")
    assert isinstance(compiled_attention(torch.bfloat16), PagedCpuAttention)
