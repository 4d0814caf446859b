"""The CPU kernels against the reference, over random ranks, segment layouts, empty and base-only segments."""

from __future__ import annotations

import pytest
import torch

from server.devices.cpu.lora import CpuKernels, cpu_kernels
from server.devices.cpu.native import libraries, library
from server.lora.kernels.interface import SCRATCH_BYTES, ArenaView, LoraKernels, Part
from server.lora.kernels.reference import ReferenceKernels
from server.lora.segments import Segments
from tests.lora.kernels import apply, random_arena

Mix = tuple[tuple[tuple[int, float], ...], int]
KERNELS: list[LoraKernels] = [ReferenceKernels(), *map(CpuKernels, libraries())]


def random_mixes(generator: torch.Generator, slots: int, segments: int, longest: int) -> list[Mix]:
    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    return [
        (tuple((draw(slots), 0.5 + draw(4) / 2) for _ in range(draw(3))), 1 + draw(longest))
        for _ in range(segments)
    ]


def check(kernels: LoraKernels, dtype: torch.dtype, seed: int, longest: int, tail: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(48, 80), (576, 192), (33, 300), (192, 1536)]
    ranks = torch.randint(0, 65, (6, len(shapes)), generator=generator)
    ranks[torch.rand(ranks.shape, generator=generator) < 0.2] = 0
    arena = random_arena(ranks.tolist(), shapes, dtype, seed)
    segments = Segments.build(random_mixes(generator, slots=6, segments=7, longest=longest))
    assert segments is not None
    for module, (n_in, n_out) in enumerate(shapes):
        x = torch.randn(segments.num_tokens + tail, n_in, generator=generator).to(dtype)
        out = torch.randn(segments.num_tokens + tail, n_out, generator=generator).to(dtype)
        expected = out.double()
        apply(ReferenceKernels(torch.float64), expected, x, module, segments, arena)
        got = out.clone()
        apply(kernels, got, x, module, segments, arena)
        assert torch.equal(got[segments.num_tokens :], out[segments.num_tokens :])
        error = (got.double() - expected).norm() / expected.norm()
        assert error < (1e-6 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("longest", "tail"), [(1, 0), (1, 3), (9, 2), (70, 5), (250, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_cpu_kernels_equal_reference(dtype: torch.dtype, longest: int, tail: int, seed: int) -> None:
    for lib in libraries():  # what another processor would run, too
        check(CpuKernels(lib), dtype, seed, longest, tail)


def test_cpu_kernels_take_modules_side_by_side() -> None:
    widths, generator = (40, 8, 24), torch.Generator().manual_seed(3)
    ranks = torch.randint(0, 20, (6, len(widths)), generator=generator).tolist()
    arena = random_arena(ranks, [(16, width) for width in widths], torch.float32, seed=3)
    segments = Segments.build(random_mixes(generator, slots=6, segments=7, longest=9))
    assert segments is not None
    x = torch.randn(segments.num_tokens, 16, generator=generator)
    expected = torch.randn(segments.num_tokens, sum(widths), generator=generator)
    before = expected.clone()
    for module, part in enumerate(expected.split(widths, dim=1)):
        apply(ReferenceKernels(), part, x, module, segments, arena)
    for kernels in KERNELS:
        out = before.clone()
        apply(kernels, out, x, 0, segments, arena, widths)
        torch.testing.assert_close(out, expected)


def test_float32_reference_is_close_to_float64() -> None:
    check(ReferenceKernels(), torch.float32, seed=11, longest=5, tail=1)


def test_compiled_kernels_are_used_here() -> None:
    if library() is None:
        pytest.skip("no compiler on this machine")
    assert isinstance(cpu_kernels(torch.bfloat16), CpuKernels)


def test_rows_may_be_strided() -> None:
    arena = random_arena([[8]], [(32, 64)], torch.float32, seed=1)
    segments = Segments.build([(((0, 1.0),), 5)])
    assert segments is not None
    x, expected = torch.randn(5, 40)[:, :32], torch.zeros(5, 64)
    apply(ReferenceKernels(), expected, x, 0, segments, arena)
    for kernels in KERNELS:
        out = torch.zeros(5, 100)
        apply(kernels, out[:, :64], x, 0, segments, arena)
        torch.testing.assert_close(out[:, :64], expected)
        assert (out[:, 64:] == 0).all()


def test_no_mix_is_no_segments() -> None:
    assert Segments.build([]) is None


def test_a_high_rank_and_a_long_prompt() -> None:
    """More ranks than either side of the layer, more tokens than a task takes."""
    arena = random_arena([[900], [3]], [(40, 72)], torch.float32, seed=5)
    segments = Segments.build([(((0, 1.0), (1, 0.5)), 700), (((1, 1.0),), 1)])
    assert segments is not None
    x, expected = torch.randn(701, 40), torch.zeros(701, 72)
    apply(ReferenceKernels(), expected, x, 0, segments, arena)
    for kernels in KERNELS:
        out = torch.zeros(701, 72)
        apply(kernels, out, x, 0, segments, arena)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-2)


def test_scratch_is_bounded_at_the_highest_rank() -> None:
    """By what stands in one place, also where each adapter of a mix has its ranks on another module."""
    tokens, lib = 4_000, library()
    if lib is None:
        pytest.skip("no compiler on this machine")
    kernels = CpuKernels(lib)
    rank = kernels.max_mix_rank(tokens)
    ranks = torch.diag(torch.tensor([rank] * 4, dtype=torch.int32))
    arena = ArenaView(torch.zeros(1), torch.zeros(4, 4, len(Part), dtype=torch.int64), ranks)
    segments = Segments.build([(tuple((slot, 1.0) for slot in range(4)), tokens)])
    assert segments is not None
    step = kernels.struct(segments, arena, width=8)
    assert tokens * rank <= step.product_stride
    assert 3 * 4 * step.product_stride <= SCRATCH_BYTES < 1.1 * 4 * (3 * tokens + 512) * rank


@pytest.mark.parametrize("kernels", KERNELS[:2])
def test_the_highest_rank_falls_with_the_tokens_of_a_step(kernels: LoraKernels) -> None:
    few, many = kernels.max_mix_rank(512), kernels.max_mix_rank(8192)
    assert few > many >= 1024
