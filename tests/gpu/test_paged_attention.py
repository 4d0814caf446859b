"""Paged attention on CUDA against float64, at the sizes of real models."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from server.devices.cuda.attention import PagedTritonAttention
from server.model.attention.interface import (
    AttentionOptions,
    AttentionPlan,
    AttentionWork,
    LayerCache,
    LayerCacheSpec,
)
from tests.gpu.errors import assert_near, poison_free_memory


@dataclass
class Step:
    """Runs of query tokens over contexts that lie in the cache in random order."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: LayerCache
    plan: AttentionPlan  # on the host

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
            LayerCacheSpec(kv_heads, k_dim, v_dim, heads),
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
                torch.tensor(starts, dtype=torch.int32),
                torch.tensor([context for _, context in runs], dtype=torch.int32),
                tables,
                slot_mapping.cpu(),
                num_seqs=len(runs),
                max_query_len=max(queries for queries, _ in runs),
                max_context_len=max(context for _, context in runs),
            ),
        )

    def backend(self) -> PagedTritonAttention:
        return PagedTritonAttention([self.cache.spec], self.query.dtype)

    def forward(self, **options: Any) -> torch.Tensor:
        backend = self.backend()
        plan = backend.prepare(self.plan).to(self.query.device)
        poison_free_memory()
        scale = self.query.shape[2] ** -0.5
        asked = AttentionOptions(scale, **options)
        return backend.forward(self.query, self.key, self.value, self.cache, plan, asked)

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
            blocks = self.plan.block_tables[s, : -(-contexts[s] // block_size)].long().to(self.query.device)
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
    "decode, one long": [(1, 8000 if s == 20 else 144 + s) for s in range(64)],
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
    slots = step.plan.slot_mapping.cuda()
    written = (tensor.transpose(1, 2)[slots // 16, slots % 16] for tensor in (step.cache.k, step.cache.v))
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


def copied(work: AttentionWork, into: AttentionWork) -> None:
    """What a step does before a replay: rows of zeros where there are fewer items or cuts."""
    for rows, live in ((into.items, work.items), (into.cuts, work.cuts)):
        rows.zero_()
        rows[: len(live)].copy_(live)


@pytest.mark.parametrize("runs", ["decode, one long", "decode, few and long", "mixed"])
def test_captured_graph_replays_other_contents(runs: str) -> None:
    """Replayed with a shorter context for each sequence, new K and V, and one sequence gone."""
    step = Step.random(RUNS[runs], torch.bfloat16)
    backend, host, block_size = step.backend(), step.plan, 16
    work = backend.prepare(host).work
    assert work is not None
    assert len(work.cuts), "nothing is cut"
    room = dataclasses.replace(
        work,
        items=work.items.new_zeros(len(work.items) + work.spare, 8, device="cuda"),
        cuts=work.cuts.new_zeros(work.spare, 4, device="cuda"),
        parts=2 * work.spare,
    )
    copied(work, into=room)
    plan = dataclasses.replace(host.to(torch.device("cuda")), work=room)
    arguments = (step.query, step.key, step.value, step.cache, plan)
    backend.forward(*arguments, AttentionOptions(0.1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend.forward(*arguments, AttentionOptions(0.1))

    live = host.num_seqs - 1
    starts = host.query_starts[: live + 1]
    lengths = starts.diff()
    contexts = torch.maximum(lengths, host.context_lens[:live] - 11)
    plan.slot_mapping.fill_(-1)
    for s, (first, length, context) in enumerate(zip(starts[:-1], lengths, contexts, strict=True)):
        positions = torch.arange(context - length, context)
        slots = host.block_tables[s][positions // block_size].long() * block_size + positions % block_size
        plan.slot_mapping[first : first + length].copy_(slots)
    smaller = dataclasses.replace(host, query_starts=starts, context_lens=contexts, num_seqs=live)
    fewer = backend.prepare(smaller).work
    assert fewer is not None
    copied(fewer, into=room)
    for tensor in (step.query, step.key, step.value):
        tensor.normal_()
    graph.replay()

    tokens = int(starts[-1])
    query = step.query[:tokens].double() * (0.1 * 128**0.5)  # the reference's own scale is 128 ** -0.5
    assert_near(
        out[:tokens], dataclasses.replace(step, query=query, plan=smaller).reference(), torch.bfloat16
    )
