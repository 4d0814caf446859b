"""The LoRA kernels on CUDA against float64, at the sizes of Llama-3.1-8B's projections."""

from __future__ import annotations

import pytest
import torch

from server.devices.cuda.lora import TritonKernels
from server.devices.cuda.lora_work import lora_work
from server.lora.kernels.interface import ArenaView
from server.lora.kernels.reference import ReferenceKernels
from server.lora.segments import Segments
from tests.gpu.errors import assert_near, poison_free_memory
from tests.lora.kernels import apply

Mixes = list[tuple[tuple[tuple[int, float], ...], int]]

RANKS = [8, 16, 5, 64, 0, 128, 1, 33, 256]
PROJECTIONS = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]
LAYOUTS: dict[str, Mixes] = {
    "one token": [(((3, 1.0),), 1)],
    "decode, 64 segments": [(((g % len(RANKS), 1.0),), 1) for g in range(64)],
    "decode, shared": [(((slot, 1.0),), 1 + 2 * slot % 9) for slot in range(len(RANKS))],
    "compositions": [(((0, 0.5), (1, 1.5), (5, -1.0)), 1), ((), 1), (((3, 1.0), (3, 0.5)), 1)],
    "prefill": [(((3, 1.0),), 1000), (((1, 0.7), (2, 2.0)), 130)],
    "mixed": [*[(((g % len(RANKS), 1.0),), 1) for g in range(30)], (((3, 1.0),), 500), (((8, 1.0),), 37)],
}


def make_arena(
    ranks: list[int], in_features: int, out_features: int, dtype: torch.dtype, at: int = 64
) -> ArenaView:
    """One module, deltas of the size of x. Gaps hold NaN; `at`: element where the first A starts."""
    offsets = []
    for rank in ranks:
        b_at = at + -(-rank * in_features // 64) * 64 + 64
        offsets.append([[at, b_at, 0, 0]])
        at = b_at + -(-rank * out_features // 64) * 64 + 64
    data = torch.full((at,), torch.nan, device="cuda", dtype=dtype)
    for [[a_at, b_at, *_]], rank in zip(offsets, ranks, strict=True):
        data[a_at : a_at + rank * in_features].normal_(std=in_features**-0.5)
        data[b_at : b_at + rank * out_features].normal_(std=max(rank, 1) ** -0.5)
    return ArenaView(
        data,
        torch.tensor(offsets, device="cuda"),
        torch.tensor(ranks, dtype=torch.int32, device="cuda")[:, None],
    )


def built(mixes: Mixes) -> Segments:
    """A step's segments on the device, with their items."""
    segments = Segments.build(mixes)
    assert segments is not None
    return TritonKernels().prepare(segments).to("cuda")


def reference(
    start: torch.Tensor, x: torch.Tensor, segments: Segments, arena: ArenaView, module: int = 0
) -> torch.Tensor:
    out = start.double()
    apply(ReferenceKernels(torch.float64), out, x.double(), module, segments, arena)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("in_features", "out_features"), PROJECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_llama_projections(layout: str, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    arena = make_arena(RANKS, in_features, out_features, dtype)
    segments = built(LAYOUTS[layout])
    x = torch.randn(segments.num_tokens + 5, in_features, device="cuda").to(dtype)
    start = torch.randn(segments.num_tokens + 5, out_features, device="cuda").to(dtype)
    expected = reference(start, x, segments, arena)

    results = []
    for _ in range(2):
        out = start.clone()
        poison_free_memory()
        apply(TritonKernels(), out, x, 0, segments, arena)
        results.append(out)
    assert_near(results[0], expected, dtype)
    assert torch.equal(results[0][segments.num_tokens :], start[segments.num_tokens :])
    assert torch.equal(*results), "the same inputs gave another result: a race"


@pytest.mark.parametrize("layout", ["decode, shared", "mixed"])
def test_odd_sizes_and_strides(layout: str) -> None:
    """Widths that allow no wide loads, rows of a wider tensor, an arena that starts off alignment."""
    arena = make_arena(RANKS, 333, 77, torch.float32)
    segments = built(LAYOUTS[layout])
    x = torch.randn(segments.num_tokens, 340, device="cuda")[:, 3:336]
    start = torch.randn(segments.num_tokens, 80, device="cuda")[:, 1:78]
    out = start.clone()
    apply(TritonKernels(), out, x, 0, segments, arena)
    assert_near(out, reference(start, x, segments, arena), torch.float32)


def test_arena_past_two_to_the_31_elements() -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    assert free >= 8 * 2**30, f"needs 8 GiB of free memory, there are {free / 2**30:.1f}: fewer workers?"
    arena = make_arena([16, 64], 1024, 1024, torch.bfloat16, at=2**31 + 64)
    for lengths in ([1, 1], [100, 3]):
        segments = built([(((slot, 1.0),), length) for slot, length in enumerate(lengths)])
        x = torch.randn(segments.num_tokens, 1024, device="cuda").bfloat16()
        start = torch.randn_like(x)
        out = start.clone()
        apply(TritonKernels(), out, x, 0, segments, arena)
        assert_near(out, reference(start, x, segments, arena), torch.bfloat16)


@pytest.mark.parametrize("longest", [1, 8, 200])
def test_captured_graph_replays_other_contents(longest: int) -> None:
    """Captured at its bounds; replayed with other tokens, adapters and weights, and with fewer segments."""
    count, dtype = 24, torch.bfloat16
    arena = make_arena(RANKS, 4096, 4096, dtype)
    bounds = built([(((0, 1.0),), longest)] * count)
    assert bounds.work is not None
    x = torch.randn(bounds.num_tokens, 4096, device="cuda").to(dtype)
    out = torch.zeros_like(x)
    kernels = TritonKernels()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        apply(kernels, out, x, 0, bounds, arena)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        apply(kernels, out, x, 0, bounds, arena)

    for live_count in (count, 9, 1, 0):
        mixes: Mixes = [(((g % len(RANKS), 1.0 + g),), max(1, longest - g)) for g in range(live_count)]
        live = Segments.build(mixes or [((), 1)])
        assert live is not None
        items = lora_work(live, bounds.work.longest).items
        bounds.work.items[: len(items)].copy_(items)
        bounds.slots[:live_count].copy_(live.slots)
        bounds.weights[:live_count].copy_(live.weights)
        x.normal_()
        start = torch.randn_like(out)
        out.copy_(start)
        graph.replay()
        assert_near(out, reference(start, x, live, arena), dtype)
        assert torch.equal(out[live.num_tokens :], start[live.num_tokens :])


def test_adapter_replaced_under_a_captured_graph() -> None:
    """New weights, place and rank in the arena's own buffers show at the next replay."""
    arena = make_arena([16, 64], 1024, 1024, torch.bfloat16)
    segments = built([(((0, 1.0),), 1)])
    x, out = torch.randn(1, 1024, device="cuda").bfloat16(), torch.zeros(1, 1024, device="cuda").bfloat16()
    kernels = TritonKernels()
    apply(kernels, out, x, 0, segments, arena)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        apply(kernels, out, x, 0, segments, arena)
    arena.offsets[0].copy_(arena.offsets[1])
    arena.ranks[0] = 64
    out.zero_()
    graph.replay()
    assert_near(out, reference(torch.zeros_like(out), x, segments, arena), torch.bfloat16)
