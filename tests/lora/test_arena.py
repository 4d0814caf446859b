import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.lora.arena import Arena
from server.lora.kernels.interface import Part
from server.lora.layout import Layout
from tests.lora.image import Image

MODULES = 3


def image(seed: int, lines: int, dtype: torch.dtype = torch.float32) -> Image:
    """Random content of `lines` cache lines; the offsets point somewhere inside."""
    random = torch.Generator().manual_seed(seed)
    data = torch.randn(lines * 64 // dtype.itemsize, generator=random).to(dtype)
    offsets = torch.randint(-1, data.numel(), (MODULES, len(Part)), generator=random)  # -1: no such part
    ranks = torch.randint(0, 9, (MODULES,), generator=random).int()
    return Image(Layout(dtype, data.numel(), offsets, ranks, 0, (), np.empty(0)), data)


def put(arena: Arena, packed: Image) -> int:
    extent = arena.reserve(packed.layout.nbytes)
    assert extent is not None
    arena.room(extent).copy_(packed.data)
    return arena.commit(extent, packed.layout)


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
        assert arena.bytes_used == sum(packed.layout.nbytes for packed in resident.values())
        assert arena.bytes_free + arena.bytes_used == arena.bytes_total
        assert all(packed.lies_in(arena, slot) for slot, packed in resident.items())


def test_a_large_extent_moves_by_less_than_its_size(monkeypatch):
    """Source and destination overlap: staged in several pieces, front first."""
    monkeypatch.setattr("server.lora.arena._STAGING_BYTES", 192)
    arena = Arena(64 * 64, MODULES, torch.bfloat16)
    first, packed = put(arena, image(0, 1, torch.bfloat16)), image(1, 40, torch.bfloat16)
    slot = put(arena, packed)
    arena.release(first)
    assert arena.compact() == 1
    assert packed.lies_in(arena, slot)
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
    assert packed.lies_in(arena, second)


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
    assert all(packed.lies_in(arena, slot) for slot, packed in zip(slots, images, strict=True))


def test_a_slot_is_released_once():
    arena = Arena(640, MODULES, torch.float32)
    slot = put(arena, image(0, 1))
    arena.release(slot)
    with pytest.raises(KeyError):
        arena.release(slot)
