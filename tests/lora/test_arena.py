import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.lora.arena import Arena, ExtentAllocator
from server.lora.pack import PackedAdapter

SIZE = 100


def check(allocator: ExtentAllocator, held: dict[int, int]) -> None:
    assert allocator.held == sorted(held.items())
    assert allocator.free + sum(held.values()) == SIZE
    end, largest = 0, 0
    for start, size in allocator.held:
        assert start >= end, "extents overlap"
        largest = max(largest, start - end)
        end = start + size
    assert end <= SIZE
    assert allocator.largest_hole == max(largest, SIZE - end), "free neighbours were not joined"


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.integers(1, 60)),
            st.tuples(st.just("give"), st.integers(0, 20)),
            st.tuples(st.just("compact"), st.integers(0, 2**8 - 1)),
        ),
        max_size=60,
    )
)
def test_extents_never_overlap_and_nothing_is_lost(ops):
    allocator, held = ExtentAllocator(SIZE), {}
    for op, value in ops:
        if op == "take":
            fits = allocator.largest_hole >= value
            start = allocator.take(value)
            assert (start is not None) == fits
            if start is not None:
                held[start] = value
        elif op == "give" and held:
            start = sorted(held)[value % len(held)]
            allocator.give(start)
            del held[start]
        elif op == "compact":
            fixed = {start for n, start in enumerate(sorted(held)) if value >> n & 1}
            owner = {at: start for start, size in held.items() for at in range(start, start + size)}
            for start, to, size in allocator.compact(fixed):
                assert to < start
                assert start not in fixed
                for step in range(size):  # the owner of every cell moves with it, in this very order
                    assert owner.pop(start + step) == start
                    assert to + step not in owner
                    owner[to + step] = start
                del held[start]
                held[to] = size
                owner = {at: to if was == start else was for at, was in owner.items()}
            if not fixed:
                assert allocator.largest_hole == allocator.free
        check(allocator, held)


def test_the_tightest_hole_is_taken():
    allocator = ExtentAllocator(SIZE)
    starts = [allocator.take(size) for size in (30, 10, 20, 10)]  # and 30 left
    allocator.give(starts[0])
    allocator.give(starts[2])
    assert allocator.take(20) == 40
    assert allocator.take(25) == 0


def test_what_was_not_taken_cannot_be_given():
    allocator = ExtentAllocator(SIZE)
    start = allocator.take(10)
    allocator.give(start)
    with pytest.raises(KeyError):
        allocator.give(start)
    with pytest.raises(ValueError, match="0"):
        allocator.take(0)
    assert ExtentAllocator(0).take(1) is None


MODULES = 3


def image(seed: int, lines: int, dtype: torch.dtype = torch.float32) -> PackedAdapter:
    """Random content of `lines` cache lines; the offsets point somewhere inside."""
    random = torch.Generator().manual_seed(seed)
    data = torch.randn(lines * 64 // dtype.itemsize, generator=random).to(dtype)
    offsets = torch.randint(0, data.numel(), (MODULES, 2), generator=random)
    return PackedAdapter(data, offsets, torch.randint(0, 9, (MODULES,), generator=random).int(), str(seed))


def put(arena: Arena, packed: PackedAdapter) -> int:
    extent = arena.reserve(packed.nbytes)
    assert extent is not None
    arena.room(extent).copy_(packed.data)
    return arena.commit(extent, packed)


def holds(arena: Arena, slot: int, packed: PackedAdapter) -> bool:
    view = arena.view()
    start = int((view.offsets[slot] - packed.offsets)[0, 0])
    return (
        torch.equal(view.offsets[slot], packed.offsets + start)
        and torch.equal(view.ranks[slot], packed.ranks)
        and torch.equal(view.data[start : start + packed.data.numel()], packed.data)
    )


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["put", "drop", "compact"]), st.integers(1, 9)), max_size=40))
def test_data_survives_whatever_happens_around_it(ops):
    arena, resident = Arena(24 * 64 + 17, MODULES, torch.float32, slots=2), {}
    assert arena.bytes_total == 24 * 64
    for seed, (op, value) in enumerate(ops):
        if op == "put" and arena.largest_hole >= value * 64:
            packed = image(seed, value)
            resident[put(arena, packed)] = packed
        elif op == "drop" and resident:
            slot = sorted(resident)[value % len(resident)]
            arena.release(slot)
            del resident[slot]
            assert not arena.view().ranks[slot].any()
        elif op == "compact":
            arena.compact()
            assert arena.largest_hole == arena.bytes_free
        assert arena.bytes_used == sum(packed.nbytes for packed in resident.values())
        assert arena.bytes_free + arena.bytes_used == arena.bytes_total
        assert all(holds(arena, slot, packed) for slot, packed in resident.items())


def test_a_large_extent_moves_by_less_than_its_size(monkeypatch):
    """Source and destination overlap: staged in several pieces, front first."""
    monkeypatch.setattr("server.lora.arena._STAGING_BYTES", 192)
    arena = Arena(64 * 64, MODULES, torch.bfloat16)
    first, packed = put(arena, image(0, 1, torch.bfloat16)), image(1, 40, torch.bfloat16)
    slot = put(arena, packed)
    arena.release(first)
    assert arena.compact() == 1
    assert holds(arena, slot, packed)
    assert arena.largest_hole == arena.bytes_free == 24 * 64


def test_an_extent_that_is_being_written_stays():
    arena = Arena(10 * 64, MODULES, torch.float32)
    first, second = put(arena, image(0, 2)), None
    packed = image(2, 3)
    writing = arena.reserve(2 * 64)
    second = put(arena, packed)
    arena.release(first)
    room = arena.room(writing)
    room.fill_(7.0)
    assert arena.compact() == 0  # the extent behind it has nowhere to go
    assert (arena.room(writing) == 7.0).all()
    assert arena.room(writing).data_ptr() == room.data_ptr()
    arena.abandon(writing)
    assert arena.compact() == 1
    assert holds(arena, second, packed)


def test_the_view_changes_only_when_the_tables_grow():
    arena = Arena(64 * 64, MODULES, torch.float32, slots=2)
    images = [image(seed, 1) for seed in range(5)]
    view = arena.view()
    slots = [put(arena, packed) for packed in images[:2]]
    arena.compact()
    assert arena.view() is view
    slots += [put(arena, packed) for packed in images[2:]]
    assert arena.view() is not view
    assert arena.view().data is view.data
    assert arena.view().ranks.shape == (8, MODULES)
    assert sorted(slots) == [0, 1, 2, 3, 4]
    assert all(holds(arena, slot, packed) for slot, packed in zip(slots, images, strict=True))


def test_a_slot_is_released_once():
    arena = Arena(640, MODULES, torch.float32)
    slot = put(arena, image(0, 1))
    arena.release(slot)
    with pytest.raises(KeyError):
        arena.release(slot)
