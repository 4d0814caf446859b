"""The Triton LoRA kernels against the float64 reference, in Triton's interpreter (see tests/conftest.py).

float32 only: the interpreter's bfloat16 `tl.dot` is wrong (seen on 3.9). tests/gpu has the other types.
"""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from server.lora.kernels.interface import ArenaView, Modules, Part
from server.lora.kernels.reference import ReferenceKernels
from server.lora.segments import Segments, SegmentWork

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles here: tests/gpu runs these kernels", allow_module_level=True)

from server.devices.cuda.lora import Tiling, TritonKernels  # noqa: E402  (after the skip)
from server.devices.cuda.lora_kernels import _shares  # noqa: E402
from server.devices.cuda.lora_work import longest_of, lora_work  # noqa: E402
from tests.lora.kernels import apply  # noqa: E402

Mixes = list[tuple[tuple[tuple[int, float], ...], int]]
ALIGNMENT = 16  # elements of float32 in 64 bytes


def make_arena(ranks: list[list[int]], in_features: int, *out_features: int, seed: int = 0) -> ArenaView:
    """Random parts for `ranks[slot][module]`, gaps filled with NaN so that a wrong address shows.

    `out_features`: of each module, or of all. Every third has a gain, every other one a bias.
    """
    generator = torch.Generator().manual_seed(seed)
    pieces, at = [torch.full((ALIGNMENT,), torch.nan)], ALIGNMENT
    offsets = torch.zeros(len(ranks), len(ranks[0]), len(Part), dtype=torch.int64)
    for slot, of_slot in enumerate(ranks):
        for module, rank in enumerate(of_slot):
            width = out_features[module % len(out_features)]
            sizes = {Part.A: rank * in_features, Part.B: rank * width}
            if (slot + module) % 3 == 0:
                sizes[Part.GAIN] = width
            if (slot + module) % 2 == 0:
                sizes[Part.BIAS] = width
            for part, size in sizes.items():
                offsets[slot, module, part] = at
                padding = -size % ALIGNMENT + ALIGNMENT
                pieces += [torch.randn(size, generator=generator), torch.full((padding,), torch.nan)]
                at += size + padding
    return ArenaView(torch.cat(pieces), offsets, torch.tensor(ranks, dtype=torch.int32))


def check(
    kernels: TritonKernels,
    mixes: Mixes,
    ranks: list[list[int]],
    in_features: int,
    out_features: int,
    base: int = 3,
) -> None:
    """Compares with float64 on `base` tokens more than the segments cover; those must stay as they are."""
    arena = make_arena(ranks, in_features, out_features)
    segments = Segments.build(mixes)
    assert segments is not None
    tokens = segments.num_tokens + base
    generator = torch.Generator().manual_seed(len(mixes))
    # rows with a stride, as slices of a wider tensor have
    x = torch.randn(tokens, in_features + 7, generator=generator)[:, :in_features]
    start = torch.randn(tokens, out_features + 5, generator=generator)[:, :out_features]
    for module in range(len(ranks[0])):
        expected, out = start.double(), start.clone()
        wide = ArenaView(arena.data.double(), arena.offsets, arena.ranks)
        apply(ReferenceKernels(torch.float64), expected, x.double(), module, segments, wide)
        apply(kernels, out, x, module, segments, arena)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(out[segments.num_tokens :], start[segments.num_tokens :])


@pytest.mark.parametrize("programs", [1, 64])
@pytest.mark.parametrize(
    "lengths", [(1, 1, 1), (1, 3, 16), (2, 70, 1, 65)], ids=["rows", "small tiles", "tiles"]
)
def test_every_path(lengths: tuple[int, ...], programs: int) -> None:
    ranks = [[5, 0], [8, 40], [1, 3], [0, 17]]
    mixes: Mixes = [(((slot, 1.0),), length) for slot, length in enumerate(lengths)]
    check(TritonKernels(programs=programs), mixes, ranks, in_features=300, out_features=136)


@pytest.mark.parametrize("longest", [1, 4, 80])
def test_compositions_add_every_entry(longest: int) -> None:
    """Also an adapter twice in a mix, the same adapter in several mixes, weight 0, and an empty mix."""
    mixes: Mixes = [
        (((0, 0.5), (1, -2.0), (2, 1.5)), longest),
        ((), 1),
        (((1, 1.0), (1, 1.0)), 1),
        (((3, 1.0), (0, 0.0)), 1),
    ]
    ranks = [[6], [33], [16], [0]]
    check(TritonKernels(programs=16), mixes, ranks, in_features=64, out_features=48)


@pytest.mark.parametrize("seed", range(12))
def test_random_layouts(seed: int) -> None:
    draw = random.Random(seed)
    modules = draw.randint(1, 3)
    ranks = [
        [draw.choice([0, 1, 5, 8, 16, 19, 64]) for _ in range(modules)] for _ in range(draw.randint(1, 6))
    ]
    longest = draw.choice([1, 1, 9, 16, 17, 90])
    mixes: Mixes = []
    for _ in range(draw.randint(1, 5)):
        entries = tuple(
            (draw.randrange(len(ranks)), draw.uniform(-2, 2)) for _ in range(draw.choice([0, 1, 1, 1, 2, 3]))
        )
        mixes.append((entries, draw.randint(1, longest)))
    in_features, out_features = draw.choice([(16, 16), (24, 264), (513, 40), (128, 128)])
    check(
        TritonKernels(programs=draw.choice([1, 8, 100])),
        mixes,
        ranks,
        in_features,
        out_features,
        base=draw.choice([0, 1, 20]),
    )


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 3, 16), (2, 70)], ids=["rows", "small tiles", "tiles"])
@pytest.mark.parametrize("widths", [(304, 48, 16), (130, 7, 33), (264, 264), (40,)])
def test_modules_side_by_side(widths: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    """In one launch; the first and the last column of the tables are of other modules."""
    ranks = [[9, 5, 0, 20, 9][: len(widths) + 2], [9, 0, 8, 3, 9][: len(widths) + 2]]
    in_features = 72
    arena = make_arena(ranks, in_features, 24, *widths, 24)
    segments = Segments.build([(((g % 2, 1.0 + g), (0, 0.5)), length) for g, length in enumerate(lengths)])
    assert segments is not None
    x = torch.randn(segments.num_tokens + 2, in_features)
    start = torch.randn(segments.num_tokens + 2, sum(widths) + 5)[:, : sum(widths)]  # rows with a stride
    expected, out = start.clone(), start.clone()
    for module, part in enumerate(expected.split(widths, dim=1), start=1):
        apply(ReferenceKernels(), part, x, module, segments, arena)
    apply(TritonKernels(max_mix_rank=48, programs=20), out, x, 1, segments, arena, widths)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    reference = start.clone()
    apply(ReferenceKernels(), reference, x, 1, segments, arena, widths)
    assert torch.equal(reference, expected)


def test_large_rank_in_several_blocks() -> None:
    check(TritonKernels(programs=200), [(((0, 1.0),), 1)], [[256]], in_features=32, out_features=24)
    check(TritonKernels(programs=200), [(((0, 1.0),), 2)], [[256]], in_features=32, out_features=24)


@pytest.mark.parametrize("longest", [1, 4, 80])
def test_replay_with_fewer_items_than_there_is_room_for(longest: int) -> None:
    """What a captured CUDA graph does: bounds of the capture, contents of a smaller step."""
    arena = make_arena([[4], [7]], 32, 32)
    segments = Segments.build([(((1, 1.0),), longest), (((0, 2.0), (1, 0.5)), 1)])
    assert segments is not None
    live = TritonKernels().prepare(segments)
    assert live.work is not None
    stale = torch.full((6, 8), 2**30, dtype=torch.int32)
    captured = replace(
        live,
        slots=torch.cat([live.slots, torch.zeros(6, dtype=torch.int32)]),
        weights=torch.cat([live.weights, torch.full((6,), torch.nan)]),
        num_tokens=live.num_tokens + 6,
        work=replace(live.work, items=torch.cat([live.work.items, stale])),
    )
    x, start = torch.randn(live.num_tokens + 6, 32), torch.randn(live.num_tokens + 6, 32)
    expected, out, usual = start.clone(), start.clone(), start.clone()
    apply(ReferenceKernels(), expected, x, 0, live, arena)
    apply(TritonKernels(), usual, x, 0, live, arena)
    apply(TritonKernels(), out, x, 0, captured, arena)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(out, usual)
    assert torch.equal(out[live.num_tokens :], start[live.num_tokens :])


def test_no_item_is_no_work() -> None:
    """A captured step of the base model alone."""
    arena = make_arena([[4]], 16, 16)
    segments = Segments.build([(((0, 1.0),), 2)])
    assert segments is not None
    none = replace(segments, work=SegmentWork(torch.zeros(9, 8, dtype=torch.int32), 1))
    out = torch.randn(2, 16)
    before = out.clone()
    apply(TritonKernels(), out, torch.randn(2, 16), 0, none, arena)
    assert torch.equal(out, before)


@pytest.mark.parametrize("most", [1, 3, 64])
def test_splits_of_the_input_are_summed(most: int) -> None:
    """However many there are; each kernel finds their number for itself."""
    for longest in (1, 5, 70):
        mixes: Mixes = [(((0, 1.0),), longest), (((1, -0.5), (0, 2.0)), 1)]
        check(TritonKernels(programs=most), mixes, [[9, 5], [3, 20]], in_features=1500, out_features=24)


@pytest.mark.parametrize("longest", [1, 4])
def test_a_mix_wider_than_the_intermediate_gives_nan(longest: int) -> None:
    """Never a wrong answer: the other segments are right, this one is NaN, and nothing past h is written."""
    arena = make_arena([[20], [8]], 32, 32)
    segments = Segments.build([(((0, 1.0),), longest), (((0, 1.0), (1, 1.0)), 1)])
    assert segments is not None
    x, start = torch.randn(longest + 1, 32), torch.randn(longest + 1, 32)
    expected, out = start.clone(), start.clone()
    apply(ReferenceKernels(), expected, x, 0, segments, arena)
    apply(TritonKernels(max_mix_rank=20), out, x, 0, segments, arena)
    torch.testing.assert_close(out[:longest], expected[:longest], rtol=1e-4, atol=1e-4)
    assert out[longest].isnan().all()


def test_no_tokens_is_no_work() -> None:
    arena = make_arena([[4]], 16, 16)
    segments = Segments.build([(((0, 1.0),), 0)])
    assert segments is not None
    out = torch.empty(0, 16)
    apply(TritonKernels(), out, torch.empty(0, 16), 0, segments, arena)
    nothing = Segments.build([((), 2)])
    assert nothing is not None
    out = torch.randn(2, 16)
    before = out.clone()
    apply(TritonKernels(), out, torch.randn(2, 16), 0, nothing, arena)
    assert torch.equal(out, before)


def test_layouts_the_kernels_would_misread_are_refused() -> None:
    arena = make_arena([[4]], 16, 16)
    segments = Segments.build([(((0, 1.0),), 2)])
    assert segments is not None
    with pytest.raises(ValueError, match="prepare"):
        TritonKernels().begin(torch.randn(2, 16), Modules(0, (16,)), segments, arena)
    x, out = torch.randn(2, 16), torch.randn(2, 16)
    with pytest.raises(ValueError, match="float64"):
        apply(TritonKernels(), out, x.double(), 0, segments, arena)
    with pytest.raises(ValueError, match="stride"):
        apply(TritonKernels(), out, torch.randn(16, 2).T, 0, segments, arena)
    with pytest.raises(ValueError, match="rows"):
        apply(TritonKernels(), out, x[:1], 0, segments, arena)
    for widths, reason in (((4, 4, 4, 4), "three are the most"), ((8, 8), "column"), ((8,), "columns")):
        with pytest.raises(ValueError, match=reason):
            apply(TritonKernels(), out, x, 0, segments, arena, widths)


@pytest.mark.parametrize("tokens", [[1] * 64, [1, 3], [8000] + [1] * 63, [17] * 5, [8192]])
@pytest.mark.parametrize("in_features", [4096, 14336, 300])
def test_work_is_bounded(tokens: list[int], in_features: int) -> None:
    """Items by real tokens, programs by the chip, the intermediate by bytes."""
    segments = Segments.build([(((0, 1.0),), count) for count in tokens])
    assert segments is not None
    work = lora_work(segments, longest_of(max(tokens)))
    rows = work.items[1:]
    assert work.room == work.items[0, 0] == sum(-(-count // work.longest) for count in tokens)
    assert rows[:, 1].sum() == sum(tokens)
    assert rows[:, 1].max() <= work.longest
    of_token = 4 * 512
    tiling = Tiling.choose(
        work.longest, work.room, sum(tokens), in_features, (4096,), 2, programs=528, h_token_bytes=of_token
    )
    assert 1 <= tiling.most_splits <= max(1, 2**26 // (sum(tokens) * of_token))
    assert max(tiling.shrink_programs, tiling.expand_programs) <= 528


@triton.jit
def write_shares(out, live, modules, in_features, programs, most_splits, BLOCK_K: triton.language.constexpr):
    splits, split_size, sharers = _shares(live, modules, in_features, programs, most_splits, BLOCK_K)
    triton.language.store(out, splits)
    triton.language.store(out + 1, split_size)
    triton.language.store(out + 2, sharers)


@pytest.mark.parametrize("modules", [1, 2, 3])
@pytest.mark.parametrize("in_features", [896, 4096, 14336])
def test_few_items_keep_as_many_programs_busy_as_many_do(in_features: int, modules: int) -> None:
    """Half of those that fill the chip at least, or of those that the input has work for."""
    programs, block_k = 528, 256
    for live in (1, 2, 4, 7, 16, 43, 64, 100, 256):
        found = torch.zeros(3, dtype=torch.int32)
        write_shares[(1,)](found, live, modules, in_features, programs, 32, BLOCK_K=block_k)
        splits, split_size, sharers = found.tolist()
        assert splits * split_size >= in_features > (splits - 1) * split_size
        most = min(programs, live * modules * min(32, -(-in_features // block_k)) * sharers)
        assert live * modules * splits * sharers >= most / 2


def test_import_is_safe_without_triton() -> None:
    script = """
import sys
sys.modules["triton"] = None
from server.devices.cuda.lora import TritonKernels
from server.devices.cuda.attention import PagedTritonAttention
for kernels in (TritonKernels, lambda: PagedTritonAttention([], None)):
    try:
        kernels()
    except RuntimeError as error:
        assert "pip install triton" in str(error)
    else:
        raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
