"""The oracle of paged attention: a loop over sequences in plain torch. Serves where nothing is compiled."""

from __future__ import annotations

import torch

from server.model.attention.interface import AttentionOptions, AttentionPlan, LayerCache, paged_cache


class PagedReferenceAttention:
    """`AttentionBackend` that gathers each sequence's context; `dtype` is what it computes in."""

    new_cache = staticmethod(paged_cache)

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def prepare(self, plan: AttentionPlan) -> AttentionPlan:
        """See `AttentionBackend.prepare`: adds nothing."""
        return plan

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: LayerCache,
        plan: AttentionPlan,
        options: AttentionOptions,
    ) -> torch.Tensor:
        block_size, kv_heads = cache.k.shape[2], cache.k.shape[1]
        blocks, offsets = plan.slot_mapping // block_size, plan.slot_mapping % block_size
        cache.k[blocks, :, offsets] = key
        cache.v[blocks, :, offsets] = value
        out = query.new_empty(*query.shape[:2], value.shape[2])
        starts, lengths = plan.query_starts.tolist(), plan.context_lens.tolist()
        for s in range(plan.num_seqs):
            length, tokens = lengths[s], slice(starts[s], starts[s + 1])
            table = plan.block_tables[s, : -(-length // block_size)].long()
            # [blocks, kv_heads, block_size, d] -> [heads, length, d]
            k, v = (
                c[table].transpose(1, 2).flatten(0, 1)[:length].transpose(0, 1).to(self.dtype)
                for c in (cache.k, cache.v)
            )
            group = query.shape[1] // kv_heads
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            scores_HQK = query[tokens].transpose(0, 1).to(self.dtype) @ k.transpose(1, 2) * options.scale
            if options.softcap is not None:
                scores_HQK = options.softcap * torch.tanh(scores_HQK / options.softcap)
            position_Q = torch.arange(length - (tokens.stop - tokens.start), length, device=query.device)
            distance_QK = position_Q[:, None] - torch.arange(length, device=query.device)
            hidden = distance_QK < 0
            if options.sliding_window is not None:
                hidden |= distance_QK >= options.sliding_window
            scores_HQK = scores_HQK.masked_fill(hidden, float("-inf"))
            if options.sinks is not None:
                sink_HQ1 = options.sinks.to(self.dtype)[:, None, None].expand(-1, scores_HQK.shape[1], 1)
                scores_HQK = torch.cat([scores_HQK, sink_HQ1], dim=-1)
            weights_HQK = scores_HQK.softmax(-1)[..., :length]
            out[tokens] = (weights_HQK @ v).transpose(0, 1).to(out.dtype)
        return out
