"""A step's attention cut into items of about equal work, on the host.

A kernel whose programs each take one sequence is as slow as the longest context. Here contexts are cut into
chunks (flash-decoding, Dao et al. 2023) until the step has enough items to fill the chip, and the longest
contexts give most of them (as FlashInfer's plan does, Ye et al. 2025).

Shape suffixes: S sequences, L tiles, C cut tiles, P items of cut tiles.
"""

from __future__ import annotations

import numpy as np
import torch

from server.model.attention.interface import AttentionWork

KEY_STEP = 64  # keys that an item begins at a multiple of: the widest step of the kernel
# Keys to cut to, as powers of two: from two steps on, since one alone is less work than joining it.
_CHUNKS = np.arange((2 * KEY_STEP).bit_length() - 1, 31, dtype=np.int32)

# Columns of `AttentionWork.items`
_SEQUENCE, _FIRST, _TOKENS, _POSITION, _BEGIN, _END, _PART = range(7)


def work_list(query_starts: np.ndarray, context_lens: np.ndarray, block_t: int, spare: int) -> AttentionWork:
    """Items for runs as `AttentionPlan` has them; at most `spare` (>= 1) more than there are tiles.

    `block_t`: query tokens of a tile. Every key that a tile's last token sees is in exactly one of its items;
    what sliding windows leave out is not looked at, since layers of one model differ in that.
    """
    tiles_L = _tiles(query_starts, context_lens, block_t)
    keys_L = tiles_L[:, _END]
    holds_all = int(keys_L.max(initial=1) - 1).bit_length()
    chunks = _CHUNKS[: max(1, holds_all - int(_CHUNKS[0]) + 1)]
    counts = ((keys_L[:, None] - 1) >> chunks) + 1  # [L, chunk lengths]
    items_L = counts[:, np.argmax(counts.sum(axis=0) <= len(tiles_L) + spare)]
    cut_C = np.flatnonzero(items_L > 1)
    items, cuts = tiles_L, np.zeros((0, 4), dtype=np.int32)
    if len(cut_C):
        items, cuts = _cut(tiles_L, items_L, cut_C)
    longest_first = np.argsort(items[:, _BEGIN] - items[:, _END], kind="stable")  # what starts last ends soon
    return AttentionWork(
        items=torch.from_numpy(items[longest_first]),
        cuts=torch.from_numpy(cuts),
        parts=int(cuts[:, 3].sum()),
        block_t=block_t,
        spare=spare,
    )


def _tiles(query_starts: np.ndarray, context_lens: np.ndarray, block_t: int) -> np.ndarray:
    """[L, 8]: each tile as one item."""
    lengths_S = query_starts[1:] - query_starts[:-1]
    within_L: np.ndarray | int = 0
    if lengths_S.max(initial=0) <= block_t:  # decode, mostly
        sequence_L = np.flatnonzero(lengths_S)
    else:
        tiles_S = -(-lengths_S // block_t)
        sequence_L = np.repeat(np.arange(len(lengths_S)), tiles_S)
        within_L = block_t * (np.arange(len(sequence_L)) - (tiles_S.cumsum() - tiles_S)[sequence_L])
    tiles_L = np.zeros((len(sequence_L), 8), dtype=np.int32)
    tiles_L[:, _SEQUENCE] = sequence_L
    tiles_L[:, _FIRST] = query_starts[sequence_L] + within_L
    tiles_L[:, _TOKENS] = np.minimum(lengths_S[sequence_L] - within_L, block_t)
    tiles_L[:, _POSITION] = (context_lens - lengths_S)[sequence_L] + within_L
    tiles_L[:, _END] = tiles_L[:, _POSITION] + tiles_L[:, _TOKENS]
    tiles_L[:, _PART] = -1
    return tiles_L


def _cut(tiles_L: np.ndarray, items_L: np.ndarray, cut_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tiles as up to `items_L` items each, and the cuts [C, 4]. Items of a cut tile are in order of keys."""
    tiles_C = tiles_L[cut_C]
    keys_C, items_C = tiles_C[:, _END], items_L[cut_C]
    share_C = -(-keys_C // (items_C * KEY_STEP)) * KEY_STEP  # even, where the last chunk would be short
    parts_C = -(-keys_C // share_C)
    firsts_C = parts_C.cumsum() - parts_C
    cut_P = np.repeat(np.arange(len(cut_C)), parts_C)
    part_P = np.arange(len(cut_P))
    items_P = tiles_C[cut_P]
    items_P[:, _BEGIN] = (part_P - firsts_C[cut_P]) * share_C[cut_P]
    items_P[:, _END] = np.minimum(items_P[:, _BEGIN] + share_C[cut_P], items_P[:, _END])
    items_P[:, _PART] = part_P
    cuts = np.empty((len(cut_C), 4), dtype=np.int32)
    cuts[:, :2] = tiles_C[:, [_FIRST, _TOKENS]]
    cuts[:, 2], cuts[:, 3] = firsts_C, parts_C
    return np.concatenate([tiles_L[items_L == 1], items_P]), cuts
