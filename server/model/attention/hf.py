"""The attention function that transformers' models call, registered through `AttentionInterface`.

A model is built with `attn_implementation=NAME`; its forward is given `attention_step=`, an object that
attends for one step and that transformers hands down to every attention layer among the keyword arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from server.model.attention.interface import (
    AttentionBackend,
    AttentionOptions,
    AttentionPlan,
    LayerCache,
    LayerCacheSpec,
    paged_cache,
)
from server.model.attention.paged_reference import PagedReferenceAttention
from server.model.step import Step

# transformers looks for "flash", "sdpa", "flex", "paged|" and "/" in the name; this one has none of them.
NAME = "chorus"

# Keyword arguments that say nothing about the attention's mathematics of a causal decoder.
_IRRELEVANT = frozenset(
    {"dropout", "is_causal", "position_ids", "position_embeddings", "use_cache", "output_attentions"}
    | {"output_hidden_states", "output_router_logits", "return_dict", "cache_position", "layer_idx"}
)


class UnsupportedModel(ValueError):
    """The base model needs something that this server does not do; the message says what."""


class AttentionStep(Protocol):
    """Attends for all layers of one forward."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """query [T, heads, k_dim], key [T, kv_heads, k_dim], value [T, kv_heads, v_dim] -> [T, heads, v_dim].

        See `AttentionBackend.forward`.
        """
        ...


@dataclass(frozen=True, eq=False)
class PagedStep:
    """The serving path: every layer's own paged cache. What stands in a layer's place finds `step` here."""

    backend: AttentionBackend
    caches: Mapping[int, LayerCache]
    step: Step

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        plan = self.step.attention
        return self.backend.forward(query, key, value, self.caches[layer], plan, options)


class ProbeStep:
    """Attends over packed sequences without a cache, and records each layer's KV shape and options."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self.specs: dict[int, LayerCacheSpec] = {}
        self.options: dict[int, AttentionOptions] = {}
        self.calls = 0

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        self.calls += 1
        self.specs[layer] = LayerCacheSpec(key.shape[1], key.shape[2], value.shape[2], query.shape[1])
        self.options[layer] = options
        longest, device = max(self._lengths), query.device
        tables = torch.arange(len(self._lengths), device=device, dtype=torch.int32)[:, None]  # a block each
        starts = torch.tensor([0, *self._lengths], device=device).cumsum(0)
        offsets = [b * longest + t for b, n in enumerate(self._lengths) for t in range(n)]
        plan = AttentionPlan(
            query_starts=starts.to(torch.int32),
            context_lens=torch.tensor(self._lengths, device=device, dtype=torch.int32),
            block_tables=tables,
            slot_mapping=torch.tensor(offsets, device=device),
            num_seqs=len(self._lengths),
            max_query_len=longest,
            max_context_len=longest,
        )
        cache = paged_cache(self.specs[layer], len(self._lengths), longest, key.dtype, device)
        return PagedReferenceAttention().forward(query, key, value, cache, plan, options)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attention_step: AttentionStep | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: query [1, heads, T, d], key and value [1, kv_heads, T, d].

    Raises UnsupportedModel on a mask or an option that changes the result and is not implemented.
    """
    if attention_step is None:
        raise UnsupportedModel("the model does not hand keyword arguments down to its attention layers")
    if attention_mask is not None:
        raise UnsupportedModel("the model builds an attention mask of its own")
    unknown = sorted(name for name, given in others.items() if name not in _IRRELEVANT and given is not None)
    if unknown:
        raise UnsupportedModel(f"the model's attention takes {', '.join(unknown)}, not implemented here")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedModel("the model's attention layers have no layer_idx")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = AttentionOptions(scale, sliding_window, softcap, s_aux)
    out = attention_step.attend(
        layer, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), options
    )
    return out[None], None


AttentionInterface.register(NAME, _attention)
