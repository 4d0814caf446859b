"""The seam between transformers' attention layers and the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from server.model.reserved import zeros


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """What one layer asks of its attention beside causality and grouped heads."""

    scale: float  # of the scores
    sliding_window: int | None = None  # a token sees itself and the `sliding_window - 1` tokens before it
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap) (Gemma 2)
    # [heads], a logit for each head that takes part in the softmax and adds no value (gpt-oss)
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerCacheSpec:
    """KV shape of one attention layer, read off a dummy forward (layers may differ)."""

    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    num_heads: int  # of the queries

    def elements_per_token(self) -> int:
        return self.num_kv_heads * (self.k_head_dim + self.v_head_dim)

    def split(self, qkv_TW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value side by side -> views: [T, heads, k_dim], [T, kv_heads, k_dim or v_dim]."""
        k_begin = self.num_heads * self.k_head_dim
        v_begin = k_begin + self.num_kv_heads * self.k_head_dim
        return (
            qkv_TW[:, :k_begin].view(-1, self.num_heads, self.k_head_dim),
            qkv_TW[:, k_begin:v_begin].view(-1, self.num_kv_heads, self.k_head_dim),
            qkv_TW[:, v_begin:].view(-1, self.num_kv_heads, self.v_head_dim),
        )


@dataclass(frozen=True)
class LayerCache:
    """One layer's share of the paged cache: block b holds tokens [b * block_size, (b + 1) * block_size).

    The first dimension is the block. How a block is laid out is the affair of the backend that made it.
    """

    k: torch.Tensor
    v: torch.Tensor
    spec: LayerCacheSpec


def paged_cache(
    spec: LayerCacheSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> LayerCache:
    """Zeros: k [blocks, kv_heads, block_size, k_head_dim], v [blocks, kv_heads, block_size, v_head_dim]."""
    k, v = (
        zeros(num_blocks, spec.num_kv_heads, block_size, dim, dtype=dtype, device=device)
        for dim in (spec.k_head_dim, spec.v_head_dim)
    )
    return LayerCache(k, v, spec)


@dataclass(frozen=True)
class AttentionWork:
    """What the programs of a step do, one list for all layers; `work_list.py` makes it on the host.

    A tile is up to `block_t` query tokens of one run, an item a tile's attention over some of its keys. The
    keys of a cut tile are shared among several items, whose partial sums are joined afterwards.
    """

    # [I, 8] int32, of each item: sequence, first token, tokens, position of the first token in its sequence,
    # keys [begin, end), its place among the partial sums or -1 for a whole tile; one is left over
    items: torch.Tensor
    cuts: torch.Tensor  # [C, 4] int32, of each cut tile: first token, tokens, first partial sum, how many
    parts: int  # room for partial sums
    block_t: int
    spare: int  # at most so many cuts, and items beyond one a tile; at most twice as many partial sums

    def to(self, device: torch.device) -> AttentionWork:
        return replace(
            self,
            items=self.items.to(device, non_blocking=True),
            cuts=self.cuts.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class AttentionPlan:
    """Where the tokens of a step stand in their sequences and in the cache.

    The T tokens of the batch are S runs, one for each sequence: run s is [query_starts[s],
    query_starts[s + 1]). Its last token is token `context_lens[s] - 1` of the sequence, so that its first
    stands at position context_lens[s] - (query_starts[s + 1] - query_starts[s]).
    """

    query_starts: torch.Tensor  # [S + 1] int32
    context_lens: torch.Tensor  # [S] int32, tokens in the cache after this step's are written
    block_tables: torch.Tensor  # [S, max_blocks] int32
    slot_mapping: torch.Tensor  # [T] int64: block * block_size + offset, where each token's K and V go
    num_seqs: int
    max_query_len: int
    max_context_len: int
    work: AttentionWork | None = None  # of a backend that wants one, see `AttentionBackend.prepare`

    def to(self, device: torch.device) -> AttentionPlan:
        return replace(
            self,
            query_starts=self.query_starts.to(device, non_blocking=True),
            context_lens=self.context_lens.to(device, non_blocking=True),
            block_tables=self.block_tables.to(device, non_blocking=True),
            slot_mapping=self.slot_mapping.to(device, non_blocking=True),
            work=None if self.work is None else self.work.to(device),
        )


class AttentionBackend(Protocol):
    """Writes a step's K and V into the paged cache and attends over each sequence's context."""

    def new_cache(
        self,
        spec: LayerCacheSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LayerCache:
        """An empty cache for one layer, as `forward` wants it; `paged_cache` for those who do not mind."""
        ...

    def prepare(self, plan: AttentionPlan) -> AttentionPlan:
        """The plan of a step on the host, with what this backend adds to it; called once before `forward`s.

        Where it adds nothing, that is the plan itself.
        """
        ...

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        plan: AttentionPlan,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Causal attention, grouped-query heads, softmax in float32.

        query: [T, heads, k_head_dim], key: [T, kv_heads, k_head_dim], value: [T, kv_heads, v_head_dim]
        (any strides with the last dimension contiguous); returns [T, heads, v_head_dim] contiguous.
        """
        ...
