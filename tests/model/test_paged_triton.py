"""Triton paged attention against a float64 loop, in Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from server.model.attention.interface import AttentionPlan, LayerCache

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles here: tests/gpu runs these kernels", allow_module_level=True)

from server.model.attention.paged_triton import Launch, PagedTritonAttention  # noqa: E402  (after the skip)


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
    backend = PagedTritonAttention(programs)
    out = backend.forward(
        step.query, step.key, step.value, step.cache, step.plan, scale=0.3, sinks=sinks, **options
    )  # type: ignore[arg-type]  # options vary
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


def test_long_context_is_split() -> None:
    step = Step.random([(1, 600), (1, 3)], kv_heads=1, block_size=16)
    launch = Launch.choose(step.plan, 2, ratio=2, kv_heads=1, row=64, programs=64)
    assert launch.splits > 2
    check(step, programs=64)
    check(step, programs=64, sinks=True, sliding_window=3)


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
    live, plan = len(step.query), step.plan
    expected = reference(step, scale=0.3)
    pad = torch.full((3,), live, dtype=torch.int32)
    step.plan = AttentionPlan(
        query_starts=torch.cat([plan.query_starts, pad]),
        context_lens=torch.cat([plan.context_lens, torch.zeros(3, dtype=torch.int32)]),
        block_tables=torch.cat([plan.block_tables, torch.zeros_like(plan.block_tables[:1]).expand(3, -1)]),
        slot_mapping=torch.cat([plan.slot_mapping, torch.full((3,), -1)]),
        num_seqs=plan.num_seqs + 3,
        max_query_len=plan.max_query_len,
        max_context_len=1000,
    )
    query, key, value = (
        torch.cat([tensor, torch.zeros_like(tensor[:1]).expand(3, -1, -1)])
        for tensor in (step.query, step.key, step.value)
    )
    blocks_before = step.cache.k.isnan().sum() - step.key.numel()
    out = PagedTritonAttention(1).forward(query, key, value, step.cache, step.plan, scale=0.3)
    torch.testing.assert_close(out[:live].double(), expected, rtol=1e-4, atol=1e-5)
    assert step.cache.k.isnan().sum() == blocks_before


def test_no_tokens() -> None:
    step = Step.random([(1, 1)])
    empty = (tensor[:0] for tensor in (step.query, step.key, step.value))
    assert PagedTritonAttention().forward(*empty, step.cache, step.plan, scale=1.0).shape == (0, 4, 16)


def test_layouts_the_kernels_would_misread_are_refused() -> None:
    step, backend = Step.random([(1, 1)]), PagedTritonAttention()
    with pytest.raises(ValueError, match="dtype"):
        backend.forward(step.query.half(), step.key, step.value, step.cache, step.plan, scale=1.0)
    with pytest.raises(ValueError, match="divide"):
        backend.forward(step.query[:, :3], step.key, step.value, step.cache, step.plan, scale=1.0)
    with pytest.raises(ValueError, match="stride"):
        backend.forward(step.query.transpose(1, 2), step.key, step.value, step.cache, step.plan, scale=1.0)


@pytest.mark.parametrize("queries", [[1] * 64, [1, 3], [2000] + [1] * 63, [17] * 5, [8192]])
@pytest.mark.parametrize(
    ("ratio", "kv_heads", "row"), [(1, 32, 160), (4, 8, 256), (7, 4, 512), (71, 1, 128), (2, 4, 1024)]
)
def test_grid_is_bounded_by_real_tokens(queries: list[int], ratio: int, kv_heads: int, row: int) -> None:
    index = torch.empty(0, dtype=torch.int32)
    plan = AttentionPlan(index, index, index, index, len(queries), max(queries), 8192)
    launch = Launch.choose(plan, sum(queries), ratio, kv_heads, row, programs=264)
    assert launch.block_t * launch.group >= 16
    assert launch.tiles <= sum(queries) // launch.block_t + len(queries)
    assert launch.tiles >= sum(-(-count // launch.block_t) for count in queries)
