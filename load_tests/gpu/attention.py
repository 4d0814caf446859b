"""Decode attention alone against the bytes of the KV cache it must read.

    python -m load_tests.gpu.attention

One new token for each of `sequences` sequences with `context` tokens each, in the shape of one layer of
Llama-3.1-8B (32 heads, 8 KV heads of 128). The floor is one read of all K and V at the rate of a
device-to-device copy. Blocks lie in random order, and calls rotate over layers so that no cache holds them.
"""

from __future__ import annotations

import torch

from load_tests.gpu.timing import copy_rate, median_seconds
from server.model.attention.interface import AttentionPlan, LayerCache
from server.model.attention.paged_triton import PagedTritonAttention

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
SHAPES = [(1, 1024), (1, 8192), (1, 65536), (16, 1024), (16, 8192), (64, 1024), (64, 8192), (256, 1024)]
COLD_BYTES = 512 * 2**20


def measure(sequences: int, context: int) -> tuple[float, int]:
    """Seconds a layer, and the bytes of K and V that it reads."""
    blocks = sequences * context // BLOCK
    bytes_read = 2 * 2 * sequences * context * KV_HEADS * DIM
    layers = min(64, max(2, -(-COLD_BYTES // bytes_read)))
    caches = [
        LayerCache(*(torch.randn(blocks, KV_HEADS, BLOCK, DIM, device="cuda").bfloat16() for _ in "kv"))
        for _ in range(layers)
    ]
    tables = torch.randperm(blocks, device="cuda").int().view(sequences, -1)
    plan = AttentionPlan(
        query_starts=torch.arange(sequences + 1, dtype=torch.int32, device="cuda"),
        context_lens=torch.full((sequences,), context, dtype=torch.int32, device="cuda"),
        block_tables=tables,
        slot_mapping=tables[:, -1].long() * BLOCK + BLOCK - 1,
        num_seqs=sequences,
        max_query_len=1,
        max_context_len=context,
    )
    query = torch.randn(sequences, HEADS, DIM, device="cuda").bfloat16()
    key, value = (torch.randn(sequences, KV_HEADS, DIM, device="cuda").bfloat16() for _ in "kv")
    backend = PagedTritonAttention()

    def work() -> None:
        for cache in caches:
            backend.forward(query, key, value, cache, plan, scale=DIM**-0.5)

    return median_seconds(work) / layers, bytes_read


def main() -> None:
    rate = copy_rate()
    print(f"decode attention, one layer, bf16; copy {rate / 1e12:.2f} TB/s")
    print(f"{'sequences':>10}{'context':>9}{'us':>10}{'floor us':>10}{'share':>8}")
    for sequences, context in SHAPES:
        seconds, bytes_read = measure(sequences, context)
        floor = bytes_read / rate
        share = floor / seconds
        print(f"{sequences:10}{context:9}{1e6 * seconds:10.1f}{1e6 * floor:10.1f}{share:8.0%}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
