"""Decode attention alone against the bytes of the KV cache it must read.

    python -m load_tests.gpu.attention

One new token for each sequence of a batch, in the shape of one layer of Llama-3.1-8B (32 heads, 8 KV heads of
128). Even batches, and one in which a single context is long. The floor is one read of all K and V at the
rate of a device-to-device copy. Blocks lie in random order, and calls rotate over layers so that no cache
holds them. Under 30 s on a Hopper card.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from load_tests.gpu.timing import copy_rate, device, median_seconds
from server.devices.cuda.attention import PagedTritonAttention
from server.model.attention.interface import AttentionOptions, AttentionPlan, LayerCache, LayerCacheSpec

if TYPE_CHECKING:
    from load_tests.gpu.context import Context

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
EVEN = [(1, 1024), (1, 8192), (1, 65536), (16, 1024), (16, 8192), (64, 1024), (64, 8192), (256, 1024)]
# The context of each sequence, tokens.
BATCHES = [*([context] * sequences for sequences, context in EVEN), [144] * 31 + [8192] + [144] * 32]
COLD_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Row:
    sequences: int
    shortest: int  # context, tokens
    longest: int
    items: int  # that the step was cut into
    floor_us: float  # a layer
    us: float

    def __str__(self) -> str:
        context = f"{self.longest}" if self.shortest == self.longest else f"{self.shortest}..{self.longest}"
        return (
            f"{self.sequences:>10}{context:>12}{self.items:>7}{self.us:>10.1f}{self.floor_us:>10.1f}"
            f"{self.floor_us / self.us:>8.0%}"
        )


HEAD = f"{'sequences':>10}{'context':>12}{'items':>7}{'us':>10}{'floor us':>10}{'share':>8}"


def decode_plan(contexts: Sequence[int]) -> AttentionPlan:
    """On the host: one token for each sequence, over blocks in random order that fill the cache."""
    counts = [-(-context // BLOCK) for context in contexts]
    tables = torch.zeros(len(contexts), max(counts), dtype=torch.int32)
    blocks = torch.randperm(sum(counts)).int().split(counts)
    for table, of_sequence in zip(tables, blocks, strict=True):
        table[: len(of_sequence)] = of_sequence
    lengths = torch.tensor(contexts, dtype=torch.int32)
    last = torch.stack([of_sequence[-1] for of_sequence in blocks]).long()
    return AttentionPlan(
        query_starts=torch.arange(len(contexts) + 1, dtype=torch.int32),
        context_lens=lengths,
        block_tables=tables,
        slot_mapping=last * BLOCK + (lengths.long() - 1) % BLOCK,
        num_seqs=len(contexts),
        max_query_len=1,
        max_context_len=max(contexts),
    )


def measure(contexts: Sequence[int], rate: float, cold_bytes: int = COLD_BYTES) -> Row:
    """One batch; `rate`: bytes/s of a copy. The layers it rotates over hold `cold_bytes` together."""
    bytes_read = 2 * 2 * sum(contexts) * KV_HEADS * DIM
    layers = min(64, max(2, -(-cold_bytes // bytes_read)))
    spec = LayerCacheSpec(KV_HEADS, DIM, DIM, HEADS)
    backend = PagedTritonAttention([spec], torch.bfloat16)
    plan = backend.prepare(decode_plan(contexts))
    assert plan.work is not None
    items, plan = len(plan.work.items), plan.to(torch.device(device()))

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device()).bfloat16()

    blocks = sum(-(-context // BLOCK) for context in contexts)
    caches = [LayerCache(*(randn(blocks, KV_HEADS, BLOCK, DIM) for _ in "kv"), spec) for _ in range(layers)]
    query, key, value = (randn(len(contexts), heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def work() -> None:
        for cache in caches:
            backend.forward(query, key, value, cache, plan, AttentionOptions(DIM**-0.5))

    us = 1e6 * median_seconds(work) / layers
    return Row(len(contexts), min(contexts), max(contexts), items, 1e6 * bytes_read / rate, us)


def run(rate: float) -> Iterator[Row]:
    """Every batch, one after the other."""
    for contexts in BATCHES:
        yield measure(contexts, rate)
        torch.cuda.empty_cache()


def measure_part(context: Context) -> None:
    """As a part of `load_tests.gpu.benchmarks`."""
    rate = context.rate
    if rate is None:
        raise RuntimeError("decode attention is measured on a CUDA device")
    context.results.say(f"decode attention, one layer, bf16; copy {rate / 1e12:.2f} TB/s\n{HEAD}")
    for row in run(rate):
        context.results.add([row], copy_rate=rate)
        context.results.say(str(row))
        if context.deadline.over:
            context.results.say("out of time")
            return


def main() -> None:
    rate = copy_rate()
    print(f"decode attention, one layer, bf16; copy {rate / 1e12:.2f} TB/s\n{HEAD}")
    for row in run(rate):
        print(row, flush=True)


if __name__ == "__main__":
    main()
