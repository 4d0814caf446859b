"""A step's attention as a list of items: no key left out, none twice, long contexts shared out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.devices.cuda.work_list import KEY_STEP, work_list
from server.model.attention.interface import AttentionWork

RUNS = st.lists(  # (query tokens, context tokens) of each sequence; some have none, as in a padded batch
    st.tuples(st.sampled_from([0, 1, 1, 1, 5, 70]), st.one_of(st.just(0), st.integers(0, 5000))).map(
        lambda drawn: (drawn[0], sum(drawn))
    ),
    max_size=40,
)


def listed(runs: list[tuple[int, int]], block_t: int = 1, spare: int = 33) -> AttentionWork:
    """As RUNS has them."""
    starts = np.cumsum([0, *[queries for queries, _ in runs]], dtype=np.int32)
    return work_list(starts, np.array([context for _, context in runs], dtype=np.int32), block_t, spare)


@given(RUNS, st.sampled_from([1, 4, 32]), st.sampled_from([1, 8, 33, 264]))
def test_every_key_of_every_tile_is_in_one_item(
    runs: list[tuple[int, int]], block_t: int, spare: int
) -> None:
    work = listed(runs, block_t, spare)
    tiles = {}  # (sequence, first token, tokens, position) by first token
    at = 0
    for s, (queries, context) in enumerate(runs):
        for first in range(0, queries, block_t):
            tokens = min(block_t, queries - first)
            tiles[at + first] = (s, at + first, tokens, context - queries + first)
        at += queries
    assert len(work.items) <= len(tiles) + spare
    assert len(work.cuts) <= spare
    assert work.parts <= 2 * spare
    spans: dict[int, list[tuple[int, int, int]]] = {first: [] for first in tiles}
    for *tile, begin, end, part, _ in work.items.tolist():
        assert tuple(tile) == tiles[tile[1]]
        assert begin % KEY_STEP == 0
        spans[tile[1]].append((begin, end, part))
    cuts = {first: (tokens, part, count) for first, tokens, part, count in work.cuts.tolist()}
    for first, (_, _, tokens, position) in tiles.items():
        ends = [0]
        for begin, end, _ in sorted(spans[first]):
            assert begin == ends[-1] < end
            ends.append(end)
        assert ends[-1] == position + tokens
        parts = [part for _, _, part in sorted(spans[first])]
        if len(parts) == 1:
            assert parts == [-1]
            assert first not in cuts
        else:
            assert cuts[first] == (tokens, parts[0], len(parts))
            assert parts == list(range(parts[0], parts[0] + len(parts)))
    used = Counter(part for of_tile in spans.values() for _, _, part in of_tile if part >= 0)
    assert sorted(used) == list(range(work.parts))
    assert set(used.values()) <= {1}


def lengths(work: AttentionWork) -> torch.Tensor:
    """Keys of each item."""
    return work.items[:, 5] - work.items[:, 4]


def test_one_long_context_among_64_is_shared_out() -> None:
    """Left whole it would take as long as 57 of the others, one after the other."""
    work = listed([(1, 144)] * 31 + [(1, 8192)] + [(1, 144)] * 32)
    assert work.cuts[:, 0].tolist() == [31]
    assert len(work.items) <= 64 + 33
    assert lengths(work).max() == 256


def test_contexts_that_fill_the_chip_are_left_whole() -> None:
    work = listed([(1, 1000 + s % 7) for s in range(64)])
    assert work.parts == len(work.cuts) == 0
    assert (work.items[:, 6] == -1).all()


def test_a_context_alone_takes_the_whole_chip() -> None:
    assert 24 < len(listed([(1, 8192)]).items) <= 34
    assert len(listed([(1, 100)]).items) == 1, "joining costs more than a step"


def test_the_longest_items_come_first() -> None:
    of_item = lengths(listed([(1, 100), (1, 900), (1, 500)] * 20))
    assert of_item.tolist() == sorted(of_item.tolist(), reverse=True)
