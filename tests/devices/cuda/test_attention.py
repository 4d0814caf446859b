"""Triton paged attention against a float64 loop, in Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch

from server.model.attention.interface import AttentionOptions, AttentionPlan, LayerCache, LayerCacheSpec

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles here: tests/gpu runs these kernels", allow_module_level=True)

from server.devices.cuda.attention import PagedTritonAttention, Shape  # noqa: E402  (after the skip)
from server.devices.cuda.work_list import KEY_STEP  # noqa: E402  (the same)


@dataclass
class Step:
    """A step over sequences whose earlier tokens are in the cache already, and what the cache should hold."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: LayerCache
    plan: AttentionPlan
    keys: list[torch.Tensor]  # of each sequence, [context, kv_heads, k_head_dim]
    values: list[torch.Tensor]

    @classmethod
    def random(
        cls,
        runs: list[tuple[int, int]],
        *,
        kv_heads: int = 2,
        ratio: int = 2,
        k_dim: int = 16,
        v_dim: int = 16,
        block_size: int = 4,
        seed: int = 0,
    ) -> Step:
        """`runs`: (query tokens, context tokens) of each sequence. Cache places never written hold NaN."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        counts = [-(-context // block_size) for _, context in runs]
        blocks = sum(counts) + 3
        cache = LayerCache(
            torch.full((blocks, kv_heads, block_size, k_dim), torch.nan),
            torch.full((blocks, kv_heads, block_size, v_dim), torch.nan),
            LayerCacheSpec(kv_heads, k_dim, v_dim, kv_heads * ratio),
        )
        free = torch.randperm(blocks, generator=generator).tolist()
        tables = torch.zeros(len(runs), max(counts) + 1, dtype=torch.int32)
        keys, values, slots, starts = [], [], [], [0]
        for s, (queries, context) in enumerate(runs):
            mine = [free.pop() for _ in range(counts[s])]
            tables[s, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
            keys.append(normal(context, kv_heads, k_dim))
            values.append(normal(context, kv_heads, v_dim))
            for n in range(context):
                block, offset = mine[n // block_size], n % block_size
                if n < context - queries:
                    cache.k[block, :, offset], cache.v[block, :, offset] = keys[s][n], values[s][n]
                else:
                    slots.append(block * block_size + offset)
            starts.append(starts[-1] + queries)
        fresh = [(queries, context) for queries, context in runs]
        key = torch.cat([keys[s][context - queries :] for s, (queries, context) in enumerate(fresh)])
        value = torch.cat([values[s][context - queries :] for s, (queries, context) in enumerate(fresh)])
        # strided, as slices of one packed projection are
        heads = kv_heads * ratio
        packed = normal(starts[-1], heads * k_dim + 9)
        return cls(
            query=packed[:, : heads * k_dim].view(starts[-1], heads, k_dim),
            key=key.transpose(0, 1).contiguous().transpose(0, 1),
            value=value,
            cache=cache,
            plan=AttentionPlan(
                query_starts=torch.tensor(starts, dtype=torch.int32),
                context_lens=torch.tensor([context for _, context in runs], dtype=torch.int32),
                block_tables=tables,
                slot_mapping=torch.tensor(slots, dtype=torch.int64),
                num_seqs=len(runs),
                max_query_len=max(queries for queries, _ in runs),
                max_context_len=max(context for _, context in runs),
            ),
            keys=keys,
            values=values,
        )

    def backend(self, programs: int = 8) -> PagedTritonAttention:
        return PagedTritonAttention([self.cache.spec], self.query.dtype, programs)


def reference(
    step: Step,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention token by token and head by head, in float64."""
    tokens, heads, _ = step.query.shape
    out = torch.zeros(tokens, heads, step.values[0].shape[2], dtype=torch.float64)
    starts = step.plan.query_starts.tolist()
    for s, (keys, values) in enumerate(zip(step.keys, step.values, strict=True)):
        ratio = heads // keys.shape[1]
        for t in range(starts[s], starts[s + 1]):
            position = len(keys) - (starts[s + 1] - t)
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            for head in range(heads):
                k = keys[first : position + 1, head // ratio].double()
                v = values[first : position + 1, head // ratio].double()
                score = k @ step.query[t, head].double() * scale
                if softcap is not None:
                    score = softcap * torch.tanh(score / softcap)
                if sinks is not None:
                    score = torch.cat([score, sinks[head : head + 1].double()])
                out[t, head] = score.softmax(0)[: len(k)] @ v
    return out


def check(step: Step, programs: int = 8, **options: object) -> None:
    sinks = torch.randn(step.query.shape[1]) if options.pop("sinks", False) else None
    expected = reference(step, scale=0.3, sinks=sinks, **options)  # type: ignore[arg-type]  # options vary
    backend = step.backend(programs)
    plan = backend.prepare(step.plan)
    asked = AttentionOptions(0.3, sinks=sinks, **options)  # type: ignore[arg-type]  # options vary
    out = backend.forward(step.query, step.key, step.value, step.cache, plan, asked)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert out.is_contiguous()


DECODE = [(1, 1), (1, 7), (1, 130), (1, 64)]
PREFILL = [(5, 5), (70, 70), (1, 1)]
MIXED = [(1, 90), (20, 21), (33, 140), (1, 1), (3, 3)]


@pytest.mark.parametrize("runs", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])
@pytest.mark.parametrize("ratio", [1, 3, 4, 8])
def test_grouped_heads(runs: list[tuple[int, int]], ratio: int) -> None:
    check(Step.random(runs, ratio=ratio, kv_heads=1))


@pytest.mark.parametrize("runs", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 9},
        {"softcap": 2.0},
        {"sinks": True},
        {"sliding_window": 70, "softcap": 5.0, "sinks": True},
    ],
    ids=["window", "softcap", "sinks", "all"],
)
def test_options(runs: list[tuple[int, int]], options: dict[str, object]) -> None:
    check(Step.random(runs, seed=1), programs=64, **options)
    if len(options) > 1:
        check(Step.random(runs, seed=2), programs=1, **options)


@pytest.mark.parametrize(("k_dim", "v_dim"), [(96, 96), (80, 80), (24, 12), (16, 33), (192, 128)])
@pytest.mark.parametrize("programs", [1, 64], ids=["whole", "split"])
def test_head_dimensions(k_dim: int, v_dim: int, programs: int) -> None:
    check(Step.random([(1, 150), (18, 20)], k_dim=k_dim, v_dim=v_dim, seed=2), programs)
    check(Step.random([(1, 150), (1, 20)], k_dim=k_dim, v_dim=v_dim, seed=2), programs)


@pytest.mark.parametrize("seed", range(8))
def test_random_layouts(seed: int) -> None:
    draw = random.Random(seed)
    longest = draw.choice([1, 1, 6, 40])
    runs = []
    for _ in range(draw.randint(1, 5)):
        queries = draw.randint(1, longest)
        runs.append((queries, queries + draw.choice([0, 0, draw.randint(1, 200)])))
    step = Step.random(
        runs,
        kv_heads=draw.choice([1, 2, 3]),
        ratio=draw.choice([1, 2, 3, 5]),
        block_size=draw.choice([1, 4, 5, 16]),
        seed=seed,
    )
    options = {
        "sliding_window": draw.choice([None, 1, 30]),
        "softcap": draw.choice([None, 3.0]),
        "sinks": draw.choice([False, True]),
    }
    check(step, draw.choice([1, 30, 300]), **options)


def test_one_long_context_among_short_ones() -> None:
    """Cut into as many items as the chip has room for; the short ones write to the output at once."""
    step = Step.random([(1, 600), *[(1, 3)] * 9, (1, 129)], kv_heads=1, block_size=16)
    work = step.backend(programs=8).prepare(step.plan).work
    assert work is not None
    assert work.cuts.tolist() == [[0, 1, 0, 5], [10, 1, 5, 2]]
    check(step)
    check(step, sinks=True, sliding_window=3)  # the first items of the long one see nothing


def test_layers_of_different_shapes_share_one_list() -> None:
    """The list's tiles are as large as the layer allows that allows least."""
    runs = [(20, 150), (1, 200), (3, 3)]
    wide, narrow = Step.random(runs, kv_heads=1, ratio=8), Step.random(runs, kv_heads=3, ratio=1)
    specs = [LayerCacheSpec(1, 16, 16, 8), LayerCacheSpec(3, 16, 16, 3)]
    backend = PagedTritonAttention(specs, torch.float32, programs=8)
    for step in (wide, narrow):
        plan = backend.prepare(step.plan)
        out = backend.forward(step.query, step.key, step.value, step.cache, plan, AttentionOptions(0.3))
        torch.testing.assert_close(out.double(), reference(step, scale=0.3), rtol=1e-4, atol=1e-5)


def test_writes_exactly_the_slots_of_the_step() -> None:
    step = Step.random(MIXED)
    before = step.cache.k.clone(), step.cache.v.clone()
    check(step)
    slots = step.plan.slot_mapping
    for now, old, fresh in zip((step.cache.k, step.cache.v), before, (step.key, step.value), strict=True):
        rows = now.transpose(1, 2).flatten(0, 1)  # [slots, kv_heads, dim]
        assert torch.equal(rows[slots], fresh)
        others = torch.ones(len(rows), dtype=torch.bool)
        others[slots] = False
        assert torch.equal(rows[others].nan_to_num(), old.transpose(1, 2).flatten(0, 1)[others].nan_to_num())


@pytest.mark.parametrize("runs", [DECODE, MIXED], ids=["decode", "mixed"])
def test_replay_with_fewer_sequences_than_the_bounds(runs: list[tuple[int, int]]) -> None:
    """What a captured CUDA graph does: sequences without tokens, tokens without a slot."""
    step = Step.random(runs)
    live, plan = len(step.query), step.backend().prepare(step.plan)
    expected = reference(step, scale=0.3)
    work = plan.work
    assert work is not None
    assert len(work.cuts), "nothing is cut"

    def longer(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows, rows.new_zeros(5, *rows.shape[1:])])

    plan = replace(
        plan,
        slot_mapping=torch.cat([plan.slot_mapping, torch.full((5,), -1)]),
        work=replace(work, items=longer(work.items), cuts=longer(work.cuts), parts=work.parts + 5),
    )
    query, key, value = (longer(tensor) for tensor in (step.query, step.key, step.value))
    blocks_before = step.cache.k.isnan().sum() - step.key.numel()
    out = step.backend().forward(query, key, value, step.cache, plan, AttentionOptions(0.3))
    torch.testing.assert_close(out[:live].double(), expected, rtol=1e-4, atol=1e-5)
    assert step.cache.k.isnan().sum() == blocks_before


def test_no_tokens() -> None:
    step = Step.random([(1, 1)])
    backend, empty = step.backend(), (tensor[:0] for tensor in (step.query, step.key, step.value))
    none = torch.zeros(1, dtype=torch.int32)
    plan = backend.prepare(replace(step.plan, query_starts=none, context_lens=none[:0]))
    assert backend.forward(*empty, step.cache, plan, AttentionOptions(1.0)).shape == (0, 4, 16)


def test_what_the_kernels_would_misread_is_refused() -> None:
    step = Step.random([(1, 1)])
    backend = step.backend()
    plan = backend.prepare(step.plan)
    with pytest.raises(ValueError, match="dtype"):
        backend.forward(step.query.half(), step.key, step.value, step.cache, plan, AttentionOptions(1.0))
    with pytest.raises(ValueError, match="divide"):
        backend.forward(step.query[:, :3], step.key, step.value, step.cache, plan, AttentionOptions(1.0))
    with pytest.raises(ValueError, match="stride"):
        backend.forward(
            step.query.transpose(1, 2), step.key, step.value, step.cache, plan, AttentionOptions(1.0)
        )
    with pytest.raises(ValueError, match="prepare"):
        backend.forward(step.query, step.key, step.value, step.cache, step.plan, AttentionOptions(1.0))


@pytest.mark.parametrize(
    ("ratio", "kv_heads", "dim"), [(1, 32, 80), (4, 8, 128), (7, 4, 256), (71, 1, 64), (2, 4, 512)]
)
def test_tiles_fill_a_tensor_core(ratio: int, kv_heads: int, dim: int) -> None:
    shape = Shape.of(LayerCacheSpec(kv_heads, dim, dim, kv_heads * ratio), torch.bfloat16)
    assert 16 <= shape.small_t * shape.group <= shape.large_t * shape.group <= 128
    assert KEY_STEP % shape.block_n == 0
