"""Paged attention on CUDA against float64, at the sizes of real models."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from server.model.attention.interface import AttentionPlan, LayerCache
from server.model.attention.paged_triton import PagedTritonAttention
from tests.gpu.errors import assert_near, poison_free_memory


@dataclass
class Step:
    """Runs of query tokens over contexts that lie in the cache in random order."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: LayerCache
    plan: AttentionPlan

    @classmethod
    def random(
        cls,
        runs: list[tuple[int, int]],
        dtype: torch.dtype,
        *,
        heads: int = 32,
        kv_heads: int = 8,
        k_dim: int = 128,
        v_dim: int = 128,
        block_size: int = 16,
    ) -> Step:
        """`runs`: (query tokens, context tokens) of each sequence. The queries' cache places hold NaN."""
        counts = [-(-context // block_size) for _, context in runs]
        cache = LayerCache(
            torch.randn(sum(counts), kv_heads, block_size, k_dim, device="cuda").to(dtype),
            torch.randn(sum(counts), kv_heads, block_size, v_dim, device="cuda").to(dtype),
        )
        tables = torch.zeros(len(runs), max(counts), dtype=torch.int32)
        order = torch.randperm(sum(counts)).int()
        starts, slots, at = [0], [], 0
        for s, ((queries, context), count) in enumerate(zip(runs, counts, strict=True)):
            tables[s, :count] = order[at : at + count]
            at += count
            positions = torch.arange(context - queries, context)
            slots.append(tables[s][positions // block_size].long() * block_size + positions % block_size)
            starts.append(starts[-1] + queries)
        slot_mapping = torch.cat(slots).cuda()
        for tensor in (cache.k, cache.v):
            tensor.transpose(1, 2)[slot_mapping // block_size, slot_mapping % block_size] = torch.nan
        packed = torch.randn(starts[-1], heads * k_dim + kv_heads * (k_dim + v_dim), device="cuda").to(dtype)
        query, key, value = packed.split([heads * k_dim, kv_heads * k_dim, kv_heads * v_dim], dim=1)
        return cls(
            query.unflatten(1, (heads, k_dim)),
            key.unflatten(1, (kv_heads, k_dim)),
            value.unflatten(1, (kv_heads, v_dim)),
            cache,
            AttentionPlan(
                torch.tensor(starts, dtype=torch.int32, device="cuda"),
                torch.tensor([context for _, context in runs], dtype=torch.int32, device="cuda"),
                tables.cuda(),
                slot_mapping,
                num_seqs=len(runs),
                max_query_len=max(queries for queries, _ in runs),
                max_context_len=max(context for _, context in runs),
            ),
        )

    def forward(self, **options: Any) -> torch.Tensor:
        poison_free_memory()
        return PagedTritonAttention().forward(
            self.query,
            self.key,
            self.value,
            self.cache,
            self.plan,
            scale=self.query.shape[2] ** -0.5,
            **options,
        )

    def reference(
        self,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """After `forward` has written the cache: gathers each context from it, in float64."""
        tokens, heads, k_dim = self.query.shape
        _, kv_heads, block_size, v_dim = self.cache.v.shape
        out = torch.zeros(tokens, heads, v_dim, dtype=torch.float64, device="cuda")
        starts, contexts = self.plan.query_starts.tolist(), self.plan.context_lens.tolist()
        for s in range(self.plan.num_seqs):
            run = slice(starts[s], starts[s + 1])
            blocks = self.plan.block_tables[s, : -(-contexts[s] // block_size)].long()
            k, v = (
                tensor[blocks].transpose(1, 2).flatten(0, 1)[: contexts[s]].double()  # [N, kv_heads, dim]
                .repeat_interleave(heads // kv_heads, dim=1)
                for tensor in (self.cache.k, self.cache.v)
            )  # fmt: skip
            score = torch.einsum("thd,nhd->htn", self.query[run].double(), k) * k_dim**-0.5
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            key_at = torch.arange(contexts[s], device="cuda")
            query_at = key_at[contexts[s] - (run.stop - run.start) :, None]
            seen = key_at <= query_at
            if sliding_window is not None:
                seen &= key_at > query_at - sliding_window
            score = score.masked_fill(~seen, -torch.inf)
            if sinks is not None:
                sink = sinks.double()[:, None, None].expand(-1, score.shape[1], 1)
                score = torch.cat([score, sink], dim=2)
            weights = score.softmax(dim=2)[:, :, : contexts[s]]
            out[run] = torch.einsum("htn,nhd->thd", weights, v)
        return out


RUNS = {
    "decode": [(1, 37 * s % 2000 + 1) for s in range(64)],
    "decode, few and long": [(1, 8000), (1, 1), (1, 4099)],
    "prefill": [(700, 700), (300, 1500), (16, 16)],
    "mixed": [*[(1, 61 * s % 900 + 1) for s in range(20)], (512, 2048), (5, 5)],
}


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_llama(runs: str, dtype: torch.dtype) -> None:
    step = Step.random(RUNS[runs], dtype)
    out = step.forward()
    assert_near(out, step.reference(), dtype)
    written = (
        tensor.transpose(1, 2)[step.plan.slot_mapping // 16, step.plan.slot_mapping % 16]
        for tensor in (step.cache.k, step.cache.v)
    )
    assert all(torch.equal(*pair) for pair in zip(written, (step.key, step.value), strict=True))
    assert torch.equal(out, step.forward()), "the same inputs gave another result: a race"


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 128},
        {"softcap": 20.0},
        {"sinks": True},
        {"sliding_window": 300, "softcap": 5.0, "sinks": True},
    ],
    ids=["window", "softcap", "sinks", "all"],
)
def test_options(runs: str, options: dict[str, Any]) -> None:
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(64, device="cuda").bfloat16()
    step = Step.random(RUNS[runs], torch.bfloat16, heads=64, k_dim=64, v_dim=64)
    assert_near(step.forward(**options), step.reference(**options), torch.bfloat16)


@pytest.mark.parametrize("runs", ["decode", "mixed"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "k_dim", "v_dim"),
    [
        (32, 32, 80, 80),
        (32, 32, 96, 96),
        (24, 8, 128, 128),
        (8, 4, 256, 256),
        (16, 16, 192, 128),
        (28, 4, 128, 128),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_head_shapes(
    runs: str, heads: int, kv_heads: int, k_dim: int, v_dim: int, dtype: torch.dtype
) -> None:
    step = Step.random(RUNS[runs], dtype, heads=heads, kv_heads=kv_heads, k_dim=k_dim, v_dim=v_dim)
    assert_near(step.forward(), step.reference(), dtype)


@pytest.mark.parametrize("runs", ["decode", "decode, few and long", "mixed"])
def test_captured_graph_replays_other_contents(runs: str) -> None:
    """Replayed with a shorter context for each sequence, new K and V, and one sequence gone."""
    step = Step.random(RUNS[runs], torch.bfloat16)
    backend = PagedTritonAttention()
    arguments = (step.query, step.key, step.value, step.cache, step.plan)
    backend.forward(*arguments, scale=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend.forward(*arguments, scale=0.1)

    plan, block_size = step.plan, 16
    starts = plan.query_starts.tolist()
    live = plan.num_seqs - 1
    lengths = [starts[s + 1] - starts[s] for s in range(live)]
    contexts = [
        max(length, context - 11)
        for length, context in zip(lengths, plan.context_lens.tolist(), strict=False)
    ]
    plan.context_lens[:live].copy_(torch.tensor(contexts))
    plan.query_starts[live + 1 :] = starts[live]
    plan.slot_mapping.fill_(-1)
    for s in range(live):
        positions = torch.arange(contexts[s] - lengths[s], contexts[s], device="cuda")
        blocks = plan.block_tables[s][positions // block_size].long()
        plan.slot_mapping[starts[s] : starts[s + 1]] = blocks * block_size + positions % block_size
    for tensor in (step.query, step.key, step.value):
        tensor.normal_()
    graph.replay()

    tokens = starts[live]
    smaller = dataclasses.replace(
        step,
        query=step.query[:tokens].double() * (0.1 * 128**0.5),  # the reference's own scale is 128 ** -0.5
        plan=dataclasses.replace(plan, num_seqs=live),
    )
    assert_near(out[:tokens], smaller.reference(), torch.bfloat16)
