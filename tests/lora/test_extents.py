import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.lora.extents import ExtentAllocator

SIZE = 100


def check(allocator: ExtentAllocator, held: dict[int, int]) -> None:
    assert allocator.taken == sorted(held.items())
    assert allocator.free + sum(held.values()) == SIZE
    end, largest = 0, 0
    for start, size in allocator.taken:
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
