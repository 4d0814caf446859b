import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.scheduling.block_pool import BlockPool, extend_hashes, root_hash
from server.scheduling.sequence import MixKey

BLOCK = 4


def hashes(tokens: list[int], mix: MixKey = (), block_size: int = BLOCK) -> list[bytes]:
    result: list[bytes] = []
    extend_hashes(result, np.array(tokens, dtype=np.int64), root_hash(mix), block_size)
    return result


def check(pool: BlockPool) -> None:
    assert pool.free + pool.cached + pool.held == pool.num_blocks
    assert pool.available == pool.free + pool.cached


def fill(pool: BlockPool, tokens: list[int], mix: MixKey = ()) -> list[int]:
    """A sequence that computed `tokens` (whole blocks) and still holds them."""
    contents = hashes(tokens, mix)
    blocks = pool.allocate(len(contents))
    for block, content in zip(blocks, contents, strict=True):
        pool.register(block, content)
    return blocks


def test_allocate_gives_distinct_blocks_until_none_is_left() -> None:
    pool = BlockPool(5, BLOCK)
    blocks = pool.allocate(3) + pool.allocate(2)
    assert sorted(blocks) == [0, 1, 2, 3, 4]
    assert (pool.free, pool.cached, pool.held) == (0, 0, 5)
    with pytest.raises(RuntimeError, match="1 blocks wanted, 0 available"):
        pool.allocate(1)
    pool.release(blocks)
    assert (pool.free, pool.cached, pool.held) == (5, 0, 0)


def test_a_failed_allocation_takes_nothing() -> None:
    pool = BlockPool(3, BLOCK)
    with pytest.raises(RuntimeError):
        pool.allocate(4)
    assert pool.free == 3


def test_releasing_twice_is_an_error() -> None:
    pool = BlockPool(3, BLOCK)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="not held"):
        pool.release(blocks)
    with pytest.raises(ValueError, match="not held"):
        pool.register(blocks[0], b"x")


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_pool_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        BlockPool(*shape)


def test_a_prefix_is_found_while_held_and_after() -> None:
    pool = BlockPool(8, BLOCK)
    first = fill(pool, list(range(12)))
    again = pool.match_prefix(hashes([*range(8), 99, 99, 99, 99]))
    assert again == first[:2]
    pool.release(first)
    assert (pool.held, pool.cached) == (2, 1)
    pool.release(again)
    assert (pool.held, pool.cached, pool.free) == (0, 3, 5)
    assert pool.match_prefix(hashes(list(range(12)))) == first
    assert pool.cached == 0


def test_a_hole_in_the_chain_ends_the_match() -> None:
    pool = BlockPool(8, BLOCK)
    fill(pool, list(range(12)))
    assert pool.match_prefix(hashes([7, *range(1, 12)])) == []


def test_the_tail_is_evicted_before_its_prefix() -> None:
    pool = BlockPool(3, BLOCK)
    blocks = fill(pool, list(range(12)))
    pool.release(blocks)
    assert pool.allocate(1) == [blocks[2]]
    assert pool.allocate(1) == [blocks[1]]
    assert pool.match_prefix(hashes(list(range(12)))) == [blocks[0]]


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    pool = BlockPool(2, BLOCK)
    old, new = fill(pool, [1] * 4), fill(pool, [2] * 4)
    pool.release(old)
    pool.release(new)
    pool.release(pool.match_prefix(hashes([1] * 4)))  # used again: now the newer of the two
    assert pool.allocate(1) == new
    assert pool.match_prefix(hashes([2] * 4)) == []
    assert pool.match_prefix(hashes([1] * 4)) == old


def test_free_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(4, BLOCK)
    pool.release(fill(pool, [1] * 8))
    pool.allocate(2)
    assert (pool.free, pool.cached) == (0, 2)


def test_a_second_block_of_the_same_content_is_not_kept() -> None:
    pool = BlockPool(4, BLOCK)
    first, second = fill(pool, [1] * 4), fill(pool, [1] * 4)
    assert first != second
    pool.release(first)
    pool.release(second)
    assert (pool.cached, pool.free) == (1, 3)
    assert pool.match_prefix(hashes([1] * 4)) == first


def test_without_prefix_caching_nothing_is_kept() -> None:
    pool = BlockPool(4, BLOCK, prefix_caching=False)
    pool.release(fill(pool, [1] * 8))
    assert (pool.cached, pool.free) == (0, 4)
    assert pool.match_prefix(hashes([1] * 8)) == []


MIXES: list[MixKey] = [
    (),
    (("a", 1.0),),
    (("a", 0.5),),
    (("b", 1.0),),
    (("a", 1.0), ("b", 1.0)),
    (("ab", 1.0),),
    (("a", 1.0), ("b", 0.5)),
    (("", 1.0),),
    (("a", 1.0), ("", 1.0)),
]


def test_other_adapters_or_weights_never_share_a_block() -> None:
    pool = BlockPool(64, BLOCK)
    owned = [fill(pool, [1] * 8, mix) for mix in MIXES]
    assert len({block for blocks in owned for block in blocks}) == 2 * len(MIXES)
    for mix, blocks in zip(MIXES, owned, strict=True):
        assert pool.match_prefix(hashes([1] * 8, mix)) == blocks
    assert len({root_hash(mix) for mix in MIXES}) == len(MIXES)


def test_hashes_grow_to_the_same_chain_in_any_steps() -> None:
    tokens = np.arange(30, dtype=np.int64)
    grown: list[bytes] = []
    for end in (3, 4, 11, 12, 13, 29, 30):
        extend_hashes(grown, tokens[:end], root_hash((("a", 1.0),)), BLOCK)
        assert len(grown) == end // BLOCK
    assert grown == hashes(list(range(30)), (("a", 1.0),))


def test_a_hash_depends_on_everything_before_its_block() -> None:
    assert hashes([0] * 8)[1] != hashes([1] + [0] * 7)[1]
    assert hashes([0] * 8)[0] != hashes([0] * 8)[1]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(1, 12), caching=st.booleans())
def test_random_traces_keep_the_books(seed: int, num_blocks: int, caching: bool) -> None:
    rng = random.Random(seed)
    pool = BlockPool(num_blocks, 1, caching)
    content: dict[int, bytes] = {}  # what each block was last written with
    alive: list[list[int]] = []
    for _ in range(60):
        if alive and rng.random() < 0.4:
            pool.release(alive.pop(rng.randrange(len(alive))))
        else:
            chain = hashes([rng.randrange(2) for _ in range(rng.randint(1, 4))], block_size=1)
            blocks = pool.match_prefix(chain)
            assert [content[block] for block in blocks] == chain[: len(blocks)]
            missing = len(chain) - len(blocks)
            if missing > pool.available:
                pool.release(blocks)
            else:
                blocks += pool.allocate(missing)
                for block, wanted in list(zip(blocks, chain, strict=True))[len(chain) - missing :]:
                    content[block] = wanted
                    pool.register(block, wanted)
                alive.append(blocks)
        check(pool)
        held = Counter(block for blocks in alive for block in blocks)
        assert pool.held == len(held)
        if not caching:
            assert all(count == 1 for count in held.values())
    for blocks in alive:
        pool.release(blocks)
    assert pool.held == 0
    check(pool)


def test_another_salt_or_tenant_is_another_root() -> None:
    mixes = [(), (("a", 0.0),), (("a", 1.0),)]
    roots = [root_hash(mix, tenant, salt) for mix in mixes for tenant in ("", "a") for salt in ("", "a", "b")]
    assert len(set(roots)) == len(roots)
