import gc
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.devices.cuda.copies import CudaCopies
from server.lora.host_cache import HostCache

CPU = torch.device("cpu")
LINE = 64
LINES = 20


def anyone(digest: str) -> bool:
    return True


def nobody(digest: str) -> bool:
    return False


def add(cache: HostCache, digest: str, lines: int) -> None:
    assert cache.reserve(digest, lines * LINE, anyone)
    cache.keep(digest)


def test_the_least_recently_used_leave_for_others():
    cache = HostCache(10 * LINE + 63)
    for digest, lines in (("a", 4), ("b", 3), ("c", 3)):
        add(cache, digest, lines)
    cache.touch("a")
    add(cache, "d", 5)
    assert cache.digests == ("a", "d")
    assert cache.bytes_used == 9 * LINE


def test_nobody_leaves_in_vain():
    cache = HostCache(10 * LINE)
    for digest, lines in (("a", 4), ("b", 6)):
        add(cache, digest, lines)
    assert not cache.reserve("c", 5 * LINE, lambda digest: digest == "a")
    assert not cache.reserve("c", 11 * LINE, anyone)
    assert not cache.reserve("c", LINE, nobody)
    assert cache.digests == ("a", "b")
    assert not HostCache(0).reserve("a", LINE, anyone)


def test_a_room_is_not_an_image_until_it_is_kept():
    cache = HostCache(10 * LINE)
    assert cache.reserve("a", 6 * LINE, anyone)
    assert "a" not in cache
    assert cache.bytes_used == 6 * LINE
    assert not cache.reserve("b", 6 * LINE, anyone)  # what is being read never leaves
    with pytest.raises(ValueError, match="a has room"):
        cache.reserve("a", LINE, anyone)
    cache.drop("a")
    cache.drop("a")
    assert cache.bytes_used == 0
    assert cache.pieces("a") == ()


def test_an_image_lies_in_pieces_where_no_hole_is_large_enough():
    cache = HostCache(10 * LINE)
    for digest in "abcde":
        add(cache, digest, 2)
    for digest in "bd":
        cache.drop(digest)
    add(cache, "f", 4)
    assert cache.digests == ("a", "c", "e", "f")
    assert [piece.numel() for piece in cache.pieces("f")] == [2 * LINE] * 2
    cache.drop("c")
    cache.drop("f")
    add(cache, "g", 6)
    assert len(cache.pieces("g")) == 1


@given(
    ops=st.lists(
        st.tuples(
            st.sampled_from(["reserve", "reserve", "keep", "touch", "drop"]),
            st.sampled_from("abcdefgh"),
            st.integers(1, LINES + 1),
        ),
        max_size=80,
    ),
    held=st.frozensets(st.sampled_from("abcdefgh"), max_size=3),
)
def test_any_trace_keeps_every_byte(ops, held):
    """Against a list of the images by age: who is there, what they hold, and that no bytes are shared."""
    cache = HostCache(LINES * LINE)
    being_read: dict[str, int] = {}
    kept: dict[str, int] = {}  # least recently used first
    for op, digest, lines in ops:
        if op == "reserve" and digest not in being_read and digest not in kept:
            free = LINES - sum(being_read.values()) - sum(kept.values())
            leaving = [other for other in kept if other not in held]
            fits = lines <= free + sum(kept[other] for other in leaving)
            assert cache.reserve(digest, lines * LINE, lambda other: other not in held) == fits
            while fits and free < lines:
                free += kept.pop(leaving.pop(0))
            if fits:
                being_read[digest] = lines
                for piece in cache.pieces(digest):
                    piece.fill_(ord(digest))
        elif op == "keep" and digest in being_read:
            cache.keep(digest)
            kept[digest] = being_read.pop(digest)
        elif op == "touch" and digest in kept:
            cache.touch(digest)
            kept[digest] = kept.pop(digest)
        elif op == "drop":
            cache.drop(digest)
            being_read.pop(digest, None)
            kept.pop(digest, None)
        assert cache.digests == tuple(kept)
        check(cache, being_read | kept)


def check(cache: HostCache, rooms: dict[str, int]) -> None:
    pieces = [(digest, piece) for digest in rooms for piece in cache.pieces(digest)]
    for digest, lines in rooms.items():
        image = torch.cat(cache.pieces(digest))
        assert image.numel() == lines * LINE
        assert (image == ord(digest)).all(), "another image was written over it"
    spans = sorted((piece.data_ptr(), piece.numel()) for _, piece in pieces)
    assert all(start + nbytes <= following for (start, nbytes), (following, _) in pairwise(spans))
    assert all(start % LINE == spans[0][0] % LINE for start, _ in spans)
    assert sum(rooms.values()) * LINE == cache.bytes_used


def test_all_of_the_slab_is_page_locked_once(monkeypatch):
    locked: dict[int, int] = {}

    def register(address: int, nbytes: int, flags: int) -> int:
        locked[address] = nbytes
        return 0

    driver = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=locked.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    cache = HostCache(10 * LINE, CudaCopies(CPU))
    HostCache(0, CudaCopies(CPU))
    add(cache, "a", 10)
    assert locked == {cache.pieces("a")[0].data_ptr(): 10 * LINE}
    del cache
    gc.collect()
    assert locked == {}


def test_memory_that_cannot_be_locked_is_an_error(monkeypatch):
    driver = SimpleNamespace(cudaHostRegister=lambda address, nbytes, flags: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    with pytest.raises(ValueError, match=r"640 bytes cannot be page-locked .*--host-cache-bytes"):
        HostCache(10 * LINE, CudaCopies(CPU))
