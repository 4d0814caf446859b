"""The work of a step's LoRA kernels as a list of items, on the host.

A program that takes an item finds all that it needs in its row: where its tokens are, and the slot and the
weight of its first adapter, mostly its only one. So two loads lie before those of weights, that of the row
and that of the adapter's place; and nothing is searched for.

Shape suffixes: G segments, I items.
"""

from __future__ import annotations

import numpy as np
import torch

from server.lora.segments import Segments, SegmentWork

# Tokens of an item, at most: of a decode step where each sequence has adapters of its own, where they share
# some, and of prompts.
ROWS, SHARED, TILES = 1, 16, 64

# Columns of `SegmentWork.items`; its first row has the number of items in the first.
_FIRST, _TOKENS, _SLOT, _WEIGHT, _ENTRY, _END = range(6)


def longest_of(max_tokens: int) -> int:
    """How many tokens an item may have where the longest segment has so many."""
    return next(longest for longest in (ROWS, SHARED, TILES) if max_tokens <= longest or longest == TILES)


def lora_work(segments: Segments | None, longest: int) -> SegmentWork:
    """Items of up to `longest` tokens of one segment, in order; none of those without an adapter."""
    if segments is None:
        return SegmentWork(torch.zeros(1, 8, dtype=torch.int32), longest)
    token_starts, entry_starts = segments.token_starts.numpy(), segments.entry_starts.numpy()
    tokens_G = np.diff(token_starts)
    items_G = -(-tokens_G // longest) * (np.diff(entry_starts) > 0)
    segment_I = np.repeat(np.arange(len(items_G)), items_G)
    within_I = longest * (np.arange(len(segment_I)) - (items_G.cumsum() - items_G)[segment_I])
    entry_I = entry_starts[segment_I]
    items = np.zeros((1 + len(segment_I), 8), dtype=np.int32)
    items[0, 0] = len(segment_I)
    rows = items[1:]
    rows[:, _FIRST] = token_starts[segment_I] + within_I
    rows[:, _TOKENS] = np.minimum(tokens_G[segment_I] - within_I, longest)
    rows[:, _SLOT] = segments.slots.numpy()[entry_I]
    rows[:, _WEIGHT] = segments.weights.numpy()[entry_I].view(np.int32)
    rows[:, _ENTRY] = entry_I
    rows[:, _END] = entry_starts[segment_I + 1]
    return SegmentWork(torch.from_numpy(items), longest)
