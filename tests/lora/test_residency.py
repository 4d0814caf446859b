import threading
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.lora.arena import Arena
from server.lora.pack import pack
from server.lora.residency import Residency
from server.lora.version import Place
from server.messages import AdapterRef, ErrorCode
from server.peft.format import judge
from server.scheduling.adapter_gate import Acquire, AcquireStatus, AdapterGate
from tests.lora.adapter_folder import LIMITS, TARGETS, weights, write
from tests.lora.image import Image, packed

READY, PENDING, FULL, FAILED = AcquireStatus
RANKS = (1, 2, 3, 4, 5, 6)


class Adapters:
    """Six adapters on disk, ranks 1 to 6, and their packed images."""

    def __init__(self, root: Path) -> None:
        self.refs = []
        self.images: dict[str, Image] = {}
        for rank in RANKS:
            folder = write(root / str(rank), weights(rank=rank, seed=rank), {"r": rank})
            self.refs.append(AdapterRef(f"digest-{rank}", str(folder)))
            self.images[f"digest-{rank}"] = packed(folder)

    def nbytes(self, *ranks: int) -> int:
        return sum(self.images[f"digest-{rank}"].layout.nbytes for rank in ranks)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return Adapters(tmp_path_factory.mktemp("adapters"))


class Bench:
    """A Residency, and a way to wait for its worker."""

    def __init__(self, arena_bytes: int, host_bytes: int = 1 << 20, pinned_share: float = 1.0) -> None:
        self.landed = threading.Semaphore(0)
        self.arena = Arena(arena_bytes, len(TARGETS), torch.float32, slots=1)
        self.residency = Residency(
            self.arena,
            TARGETS,
            host_bytes,
            LIMITS,
            pinned_share=pinned_share,
            wake=self.landed.release,
            check=lambda *_: None,
        )

    def step(self) -> None:
        """Wait for one job, if any is under way, and take in what is there."""
        if self.residency.pending:
            assert self.landed.acquire(timeout=30)
        self.residency.poll()

    def settle(self) -> None:
        """Until a step changes nothing: what was judged ahead of need is read after one in which it could
        have been brought in."""
        self.residency.poll()
        self.residency.poll()
        while self.residency.pending:
            self.step()
            self.residency.poll()

    def acquire(self, *refs: AdapterRef) -> AcquireStatus:
        """Ask at every step until the answer is final."""
        while (answer := self.residency.acquire(refs)).status is PENDING:
            self.step()
        return answer.status

    def load(self, ref: AdapterRef, pin: bool = False) -> Acquire:
        """Ask at every step until the answer is final."""
        while (answer := self.residency.load(ref, pin)).status is PENDING:
            self.step()
        return answer

    def holds(self, image: Image, digest: str) -> bool:
        return image.lies_in(self.arena, self.residency.slot(digest))


@pytest.fixture
def bench(adapters):
    made = []

    def make(*ranks: int, **options: float) -> Bench:
        """With an arena that just holds these ranks."""
        made.append(Bench(adapters.nbytes(*ranks), **options))
        return made[-1]

    yield make
    for bench in made:
        bench.residency.close()


def test_it_is_the_schedulers_gate(bench):
    gate: AdapterGate = bench(6).residency
    assert gate.acquire(()).status is READY  # the base model
    gate.release(())


def test_from_disk_to_use(adapters, bench):
    b, ref = bench(6), adapters.refs[2]
    assert b.residency.where(ref.digest) == "disk"
    assert b.residency.acquire((ref,)).status is PENDING
    assert b.residency.pending
    assert b.acquire(ref) is READY
    assert b.residency.where(ref.digest) == "arena"
    assert b.residency.resident == (ref.digest,)
    assert b.holds(adapters.images[ref.digest], ref.digest)
    assert b.residency.load_ms(ref.digest) > 0
    assert b.residency.loads == 1
    assert b.residency.acquire((ref,)).status is READY  # at once
    with pytest.raises(KeyError):
        b.residency.slot("digest-1")


def test_a_prefetch_brings_it_to_the_host(adapters, bench):
    b, ref = bench(6), adapters.refs[2]
    b.residency.prefetch(ref)
    b.residency.prefetch(ref)
    b.settle()
    assert b.residency.where(ref.digest) == "host"
    assert b.residency.host_bytes_used == adapters.nbytes(3)
    assert b.arena.bytes_used == 0
    assert b.acquire(ref) is READY


def test_many_prefetches_take_turns(adapters, bench, tmp_path, work):
    b = bench(6)
    refs = [AdapterRef(f"copy-{n}", adapters.refs[0].path) for n in range(40)]
    for ref in refs:
        b.residency.acquire((ref,))  # judged, however many there are
    b.settle()
    assert work == {"judge": 40, "pack": 40}
    assert set(b.residency.on_host) == {ref.digest for ref in refs}


def test_many_callers_share_one_load(adapters, bench):
    b, ref = bench(6), adapters.refs[0]
    assert [b.residency.acquire((ref,)).status for _ in range(5)] == [PENDING] * 5
    b.settle()
    assert b.acquire(ref) is READY
    assert b.residency.loads == 1


def test_the_least_recently_used_leaves(adapters, bench):
    b = bench(2, 2, 1)
    one, two, three = adapters.refs[:3]
    for ref in (one, two, one):
        assert b.acquire(ref) is READY
        b.residency.release((ref,))
    assert b.residency.resident == (two.digest, one.digest)
    assert b.acquire(three) is READY
    assert b.residency.resident == (one.digest, three.digest)
    assert b.residency.where(two.digest) == "host"
    assert b.residency.evictions == 1


def test_full_while_all_is_in_use(adapters, bench):
    b = bench(6, 5)
    assert b.acquire(adapters.refs[5]) is READY
    assert b.acquire(adapters.refs[4]) is READY
    assert b.acquire(adapters.refs[0]) is FULL
    b.settle()
    assert b.residency.where("digest-1") == "host"  # meanwhile
    assert b.acquire(adapters.refs[0]) is FULL
    assert not b.residency.pending
    b.residency.release((adapters.refs[4],))
    assert b.acquire(adapters.refs[0]) is READY
    assert b.residency.resident == ("digest-6", "digest-1")


def test_what_a_pending_caller_was_promised_is_kept(adapters, bench):
    b = bench(3)
    mine, other = adapters.refs[0], adapters.refs[2]
    assert b.acquire(other) is READY  # so its size is known
    b.residency.release((other,))
    assert b.residency.acquire((mine,)).status is PENDING
    b.settle()
    assert b.residency.acquire((mine,)).status is PENDING  # now with room
    b.settle()
    assert b.residency.acquire((other,)).status is FULL
    assert b.residency.acquire((mine,)).status is READY
    b.residency.release((mine,))
    assert b.acquire(other) is READY


def test_a_caller_that_gives_up_frees_what_was_kept(adapters, bench):
    b = bench(3)
    mine, other = adapters.refs[0], adapters.refs[2]
    assert b.acquire(other) is READY
    b.residency.release((other,))
    b.residency.acquire((mine,))
    b.settle()
    b.residency.acquire((mine,))
    b.residency.cancel((mine,))
    b.residency.cancel((mine,))  # for a caller that was never told PENDING it does nothing
    b.settle()
    assert b.acquire(other) is READY


def test_a_mix_is_taken_whole_or_not_at_all(adapters, bench):
    b = bench(6, 4, 1)
    a, big, c = adapters.refs[0], adapters.refs[5], adapters.refs[3]
    assert b.acquire(a, big) is READY
    b.residency.release((a, big))
    assert b.acquire(big) is READY
    assert b.acquire(a, c) is READY
    b.residency.release((a, c))
    assert b.acquire(adapters.refs[4]) is READY
    before = b.arena.bytes_used
    assert b.acquire(a, c) is FULL  # not even room for one of them is kept
    assert b.arena.bytes_used == before


def test_no_member_of_a_mix_is_evicted_for_another(adapters, bench):
    b = bench(2, 2)
    a, x, c = adapters.refs[0], adapters.refs[1], AdapterRef("copy", adapters.refs[1].path)
    for ref in (c, a, x):  # all sizes are known, and `a` was used longest ago
        assert b.acquire(ref) is READY
        b.residency.release((ref,))
    assert b.residency.acquire((a, c)).status is PENDING
    assert b.residency.resident == (a.digest,)
    assert b.acquire(a, c) is READY


def test_room_for_half_a_mix_is_given_back(adapters, bench):
    """What is being filled cannot be moved: there is room in sum, but not in pieces that fit."""
    small, large = adapters.nbytes(1), adapters.nbytes(3)
    b = bench(1, 3, 3)
    refs = (adapters.refs[0], AdapterRef("copy", adapters.refs[2].path), adapters.refs[2])
    for ref in refs:
        assert b.acquire(ref) is READY
        b.residency.release((ref,))
        b.residency.unload(ref.digest)
    front = b.arena.reserve(large - 64)
    b.arena.reserve(small + 128)  # another's, between two holes that are both too small for `large`...
    b.arena.abandon(front)
    used = b.arena.bytes_used
    assert b.arena.bytes_free >= small + large
    assert b.arena.largest_hole < large
    assert b.acquire(refs[0], refs[2]) is FULL  # ...though one of them would do for `small`
    assert b.arena.bytes_used == used


@pytest.fixture
def work(monkeypatch):
    """What the loader did so far: how often it judged and read."""
    done = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            done[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(f"server.lora.loader.{name}", call)

    counted("judge", judge)
    counted("pack", pack)
    return done


@pytest.mark.parametrize("host_bytes", [0, 64])
def test_what_has_no_room_on_the_host_is_read_into_the_arena(adapters, bench, work, host_bytes):
    b, (one, *_, five, six) = bench(6, host_bytes=host_bytes), adapters.refs
    for count, ref in enumerate((five, one, six), start=1):  # larger than before, smaller, larger
        assert b.acquire(ref) is READY
        b.residency.release((ref,))
        assert b.holds(adapters.images[ref.digest], ref.digest)
        assert work["pack"] == count
        assert b.residency.host_bytes_used == 0


def test_a_version_is_judged_once(adapters, bench, work):
    b, ref = bench(6, host_bytes=0), adapters.refs[0]
    for loads in (1, 2, 3):
        assert b.acquire(ref) is READY
        b.residency.release((ref,))
        b.residency.unload(ref.digest, forget=True)
        assert work == {"judge": 1, "pack": loads}


def test_a_version_whose_files_changed_is_judged_again_after_the_error(adapters, bench, tmp_path, work):
    b, folder = bench(6, host_bytes=0), write(tmp_path / "adapter")
    ref = AdapterRef("changed", str(folder))
    assert b.acquire(ref) is READY
    b.residency.release((ref,))
    b.residency.unload(ref.digest)
    write(folder, weights(rank=5), {"r": 5})
    while (answer := b.residency.acquire((ref,))).status is PENDING:
        b.step()
    assert answer.status is FAILED
    assert "adapter_model.safetensors" in answer.message
    b.residency.poll()
    assert b.acquire(ref) is READY
    assert work["judge"] == 2


def test_images_that_are_waited_for_stay_on_the_host(adapters, bench, work):
    b = bench(1, 2, host_bytes=adapters.nbytes(1, 2))
    one, two, three = adapters.refs[:3]
    for ref in (one, two):
        b.residency.prefetch(ref)
        b.settle()
    assert b.residency.on_host == (one.digest, two.digest)
    slow = AdapterRef("slow", two.path)
    assert b.residency.acquire((one, slow)).status is PENDING  # `one` waits until `slow` is judged
    b.residency.prefetch(three)
    b.settle()
    assert set(b.residency.on_host) == {one.digest, slow.digest}  # no room for `three` without these
    assert b.acquire(one, slow) is READY
    assert work == {"judge": 4, "pack": 3}


def test_what_is_wanted_now_is_not_read_ahead_of_need(adapters, bench, work):
    """Judged, it is read into the arena at once; what nobody asks for in that step goes to the host alone."""
    b = bench(1, 2)
    for ref in adapters.refs[:2]:
        b.residency.prefetch(ref)
        b.step()
        if ref is adapters.refs[0]:
            assert b.residency.acquire((ref,)).status is PENDING
            b.step()
    assert work == {"judge": 2, "pack": 1}
    b.settle()
    assert [b.residency.where(ref.digest) for ref in adapters.refs[:2]] == ["arena", "host"]
    assert work == {"judge": 2, "pack": 2}


@pytest.mark.parametrize("judged", [True, False])
def test_what_is_forgotten_is_not_read_ahead_of_need(adapters, bench, work, judged):
    b, ref = bench(1), adapters.refs[0]
    b.residency.prefetch(ref)
    if judged:
        b.step()
    assert b.residency.unload(ref.digest, forget=True) == "disk"
    b.settle()
    assert work == {"judge": 1}
    assert b.residency.host_bytes_used == 0


def test_a_mix_may_name_one_adapter_twice(adapters, bench):
    b, ref = bench(2), adapters.refs[1]
    assert b.acquire(ref, ref) is READY
    b.residency.release((ref, ref))
    assert b.residency.unload(ref.digest) == "host"
    with pytest.raises((KeyError, ValueError)):
        b.residency.release((ref,))


def test_never_fits(adapters, bench):
    b = bench(3)
    answer = None
    for _ in range(3):
        answer = b.residency.acquire((adapters.refs[5],))
        b.settle()
    assert (answer.status, answer.error) == (FAILED, ErrorCode.NEVER_FITS)
    assert b.acquire(adapters.refs[1], adapters.refs[2]) is FAILED
    assert b.acquire(adapters.refs[2]) is READY


def test_a_load_that_fails_is_told_to_all_and_tried_again(adapters, bench, tmp_path):
    b = bench(6)
    ref = AdapterRef("broken", str(tmp_path / "broken"))
    assert b.residency.acquire((ref,)).status is PENDING
    assert b.residency.acquire((ref, adapters.refs[0])).status is PENDING
    b.settle()
    for mix in ((ref,), (ref, adapters.refs[0]), (ref,)):
        answer = b.residency.acquire(mix)
        assert (answer.status, answer.error) == (FAILED, ErrorCode.ADAPTER_LOAD_FAILED)
        assert "adapter_config.json" in answer.message
        assert str(tmp_path) not in answer.message
    assert b.arena.bytes_used in (0, adapters.nbytes(1))
    write(tmp_path / "broken")
    b.residency.poll()
    assert b.acquire(ref) is READY


def test_a_load_that_fails_when_nobody_waits_is_forgotten(adapters, bench, tmp_path):
    b = bench(6)
    ref = AdapterRef("broken", str(tmp_path / "broken"))
    b.residency.prefetch(ref)
    b.settle()
    b.residency.acquire((ref,))
    b.residency.cancel((ref,))
    b.settle()
    write(tmp_path / "broken")
    assert b.acquire(ref) is READY


def test_files_that_go_away_after_the_first_load(adapters, bench, tmp_path):
    """The room that was reserved for the copy is given back."""
    b = bench(4, host_bytes=0)
    folder = write(tmp_path / "gone")
    ref = AdapterRef("gone", str(folder))
    assert b.acquire(ref) is READY
    b.residency.release((ref,))
    assert b.acquire(adapters.refs[0]) is READY
    b.residency.release((adapters.refs[0],))
    (folder / "adapter_model.safetensors").unlink()
    assert b.acquire(ref) is FAILED
    assert b.arena.bytes_used == adapters.nbytes(*(1,) * len(b.residency.resident))


def test_pinned_ones_stay(adapters, bench):
    b = bench(3, 2)
    one, two, three = adapters.refs[:3]
    while b.residency.load(two, pin=True).status is PENDING:
        b.step()
    assert b.residency.pinned == {two.digest}
    assert b.acquire(three) is READY
    b.residency.release((three,))
    assert b.acquire(one) is READY
    assert two.digest in b.residency.resident
    assert b.residency.unload(two.digest) == "host"
    assert b.residency.pinned == frozenset()


def test_pins_have_a_share_and_no_more(adapters, bench):
    b = bench(6, 4, 2, 1, pinned_share=0.4)
    one, two, _, four, *_ = adapters.refs
    assert b.load(four, pin=True).status is READY
    assert b.load(four, pin=True).status is READY  # again: it holds no more
    refusal = b.load(two, pin=True)
    assert (refusal.status, refusal.error) == (FAILED, ErrorCode.PIN_LIMIT)
    assert str(adapters.nbytes(2)) in refusal.message
    assert str(adapters.nbytes(4)) not in refusal.message  # what others have pinned is not told
    assert b.residency.pinned == {four.digest}
    assert b.load(one, pin=True).status is READY  # a smaller one still fits
    assert b.load(two).status is READY  # and without a pin any
    b.residency.unload(four.digest)
    assert b.load(two, pin=True).status is READY
    assert b.residency.pinned == {one.digest, two.digest}


def test_who_can_never_get_room_beside_pins_is_told(adapters, bench):
    b = bench(4, 2)
    two, four, five = (adapters.refs[rank - 1] for rank in (2, 4, 5))
    assert b.load(two, pin=True).status is READY
    while (answer := b.residency.acquire((five,))).status is PENDING:
        b.step()
    assert (answer.status, answer.error) == (FAILED, ErrorCode.OUT_OF_MEMORY)
    assert answer.message == "Pinned adapters leave too little accelerator memory for this request."
    assert b.acquire(two, four) is READY  # a pinned one of the mix itself is not in the way
    b.residency.release((two, four))
    b.residency.unload(two.digest)
    assert b.acquire(five) is READY
    b.residency.release((five,))
    assert b.residency.promises == set()


def test_an_unload_waits_for_the_last_use(adapters, bench):
    b, ref = bench(6), adapters.refs[0]
    assert b.acquire(ref) is READY
    assert b.acquire(ref) is READY
    assert b.residency.unload(ref.digest, forget=True) == "arena"
    b.residency.release((ref,))
    assert b.residency.where(ref.digest) == "arena"
    b.residency.release((ref,))
    assert b.residency.where(ref.digest) == "disk"
    assert (b.arena.bytes_used, b.residency.host_bytes_used) == (0, 0)


def test_an_unload_under_a_waiting_caller(adapters, bench):
    b, ref = bench(6), adapters.refs[0]
    b.residency.acquire((ref,))
    b.residency.unload(ref.digest, forget=True)
    assert b.acquire(ref) is READY  # it was promised
    b.residency.release((ref,))
    assert b.residency.where(ref.digest) == "disk"


def test_a_load_after_an_unload_stays(adapters, bench):
    b, ref = bench(6), adapters.refs[0]
    assert b.acquire(ref) is READY
    b.residency.unload(ref.digest, forget=True)
    assert b.residency.load(ref).status is READY
    b.residency.release((ref,))
    assert b.residency.where(ref.digest) == "arena"


def test_the_host_keeps_what_was_used_last(adapters, bench):
    b = bench(1, host_bytes=adapters.nbytes(2, 3))
    for ref in (adapters.refs[0], adapters.refs[1], adapters.refs[2]):
        b.residency.prefetch(ref)
        b.settle()
    assert [b.residency.where(ref.digest) for ref in adapters.refs[:3]] == ["disk", "host", "host"]
    assert b.residency.host_bytes_used == adapters.nbytes(2, 3)


def test_scattered_room_is_joined(adapters, bench):
    b = bench(1, 2, 1, 2)
    one, two, _, four = adapters.refs[:4]
    copy = AdapterRef("copy", one.path)
    for ref in (one, two, copy):
        assert b.acquire(ref) is READY  # 1, 2, 1, and a hole of 2
    b.residency.release((one,))
    b.residency.release((copy,))
    b.residency.unload(one.digest)
    b.residency.unload(copy.digest)
    assert b.arena.largest_hole < adapters.nbytes(4)
    assert b.acquire(four) is READY
    assert b.holds(adapters.images[two.digest], two.digest)
    assert b.holds(adapters.images[four.digest], four.digest)
    assert b.residency.evictions == 0


def test_a_worker_survives_a_bug(adapters, bench, monkeypatch, caplog):
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    b = bench(6)
    with monkeypatch.context() as patch:
        patch.setattr("server.lora.loader.pack", broken)
        assert b.acquire(adapters.refs[0]) is FAILED
    assert "digest-1" in caplog.text
    assert b.acquire(adapters.refs[1]) is READY


INDEX = st.integers(0, len(RANKS) - 1)
MIX = st.lists(INDEX, min_size=1, max_size=2).map(tuple)
OPS = st.one_of(
    st.tuples(st.sampled_from(["acquire", "ask", "ask"]), MIX),
    st.tuples(st.sampled_from(["release", "cancel"]), st.integers(0, 9)),
    st.tuples(st.sampled_from(["prefetch", "load", "pin", "unload", "forget"]), INDEX),
    st.tuples(st.sampled_from(["step", "step", "settle"]), st.none()),
)


def room_for(adapters: Adapters, digests: Iterable[str]) -> int:
    return sum(adapters.images[digest].layout.nbytes for digest in digests)


SETTLE = ("settle", None)
PINNED_IN_THE_WAY = [("prefetch", 3), ("pin", 5), SETTLE, ("pin", 5), SETTLE, ("pin", 5), ("acquire", (3,))]


@settings(max_examples=150, deadline=None)
@given(ops=st.lists(OPS, max_size=60), host=st.sampled_from([0, 7, 21]))
@example(ops=PINNED_IN_THE_WAY, host=0)
def test_any_trace_keeps_its_promises(adapters, ops, host):
    b = Bench(adapters.nbytes(6, 3), host_bytes=adapters.nbytes(1) * host)
    residency, refs = b.residency, adapters.refs
    held: list[tuple[AdapterRef, ...]] = []
    waiting: list[tuple[AdapterRef, ...]] = []
    pinned: set[str] = set()
    try:
        for op, value in ops:
            if op in ("acquire", "ask"):
                mix = tuple(refs[n] for n in value)
                if op == "ask" and waiting:
                    mix = waiting.pop(0)
                status = residency.acquire(mix).status
                if status is READY:
                    held.append(mix)
                elif status is PENDING:
                    waiting.append(mix)
                if status is FAILED:
                    assert room_for(adapters, pinned | {ref.digest for ref in mix}) > b.arena.bytes_total
            elif op == "release" and held:
                residency.release(held.pop(value % len(held)))
            elif op == "cancel" and waiting:
                residency.cancel(waiting.pop(value % len(waiting)))
            elif op == "prefetch":
                residency.prefetch(refs[value])
            elif op in ("load", "pin"):
                status = residency.load(refs[value], pin=op == "pin").status
                if status is READY and op == "pin":
                    pinned.add(refs[value].digest)
                elif status is PENDING:
                    waiting.append((refs[value],))
            elif op in ("unload", "forget"):
                pinned.discard(refs[value].digest)
                residency.unload(refs[value].digest, forget=op == "forget")
            elif op == "step":
                b.step()
            elif op == "settle":
                b.settle()
                assert b.arena.bytes_used == room_for(adapters, residency.resident)
            check(b, adapters, held, pinned)
            assert set(residency.promises) <= {frozenset(ref.digest for ref in mix) for mix in waiting}
        for mix in waiting:
            residency.cancel(mix)
        for mix in held:
            residency.release(mix)
        b.settle()
        assert residency.host_bytes_used <= adapters.nbytes(1) * host
        assert all(residency.unload(ref.digest, forget=True) == "disk" for ref in refs)
        assert b.arena.bytes_free == b.arena.largest_hole == b.arena.bytes_total
        assert residency.host_bytes_used == 0
        assert residency.resident == ()
    finally:
        residency.close()


def check(b: Bench, adapters: Adapters, held: list[tuple[AdapterRef, ...]], pinned: set[str]) -> None:
    residency = b.residency
    in_use = Counter(ref.digest for mix in held for ref in mix)
    assert in_use.keys() | pinned <= set(residency.resident)
    assert residency.pinned == pinned
    assert b.arena.bytes_free + b.arena.bytes_used == b.arena.bytes_total
    assert len({residency.slot(digest) for digest in residency.resident}) == len(residency.resident)
    for digest in residency.resident:
        assert b.holds(adapters.images[digest], digest)
    check_host(b, adapters)
    check_places(b)
    for digest in adapters.images:
        place = "arena" if digest in residency.resident else "host" if digest in residency.on_host else "disk"
        assert residency.where(digest) == place


def check_places(b: Bench) -> None:
    """Each version's place says what the arena, the host and the workers have of it."""
    residency = b.residency
    for digest, version in residency._versions.items():
        assert version.in_arena == (digest in residency.resident)
        assert version.in_arena == (version.place in (Place.RESIDENT, Place.LEAVING))
        assert (version.extent is not None) == (version.in_arena or version.place is Place.COPYING)
        if version.place in (Place.DISK, Place.HOST):
            assert (version.place is Place.HOST) == (digest in residency.on_host)
            assert digest in residency._promises, "books on what nobody waits for"
        if version.place is Place.LEAVING:
            assert version.uses or digest in residency._promises
    assert residency._jobs == sum(version.busy for version in residency._versions.values())
    assert set(residency.resident) <= residency._versions.keys()


def check_host(b: Bench, adapters: Adapters) -> None:
    """No two images share a byte, none is lost, and every whole one can be read back."""
    host = b.residency.host
    rooms = {digest: host.pieces(digest) for digest in adapters.images}
    spans = sorted((p.data_ptr(), p.numel()) for pieces in rooms.values() for p in pieces)
    assert all(start + nbytes <= following for (start, nbytes), (following, _) in pairwise(spans))
    assert sum(nbytes for _, nbytes in spans) == host.bytes_used
    assert {digest for digest, pieces in rooms.items() if pieces} >= set(host.digests)
    if not b.residency.pending:
        assert {digest for digest, pieces in rooms.items() if pieces} == set(host.digests)
    for digest in host.digests:
        assert torch.equal(torch.cat(rooms[digest]), adapters.images[digest].data.view(torch.uint8))


def test_twenty_adapters_through_room_for_two(adapters, bench):
    """Everybody is served, whoever asks in whatever order, when each gives back what it took."""
    b = bench(6, 6, host_bytes=adapters.nbytes(3))
    waiting = [
        (adapters.refs[n % 6],) if n % 3 else (adapters.refs[n % 6], adapters.refs[0]) for n in range(40)
    ]
    served = 0
    for _ in range(2_000):
        if not waiting:
            break
        b.step()
        running = [mix for mix in waiting if b.residency.acquire(mix).status is READY]
        for mix in running:
            assert all(b.holds(adapters.images[ref.digest], ref.digest) for ref in mix)
            waiting.remove(mix)
            b.residency.release(mix)
            served += 1
    assert served == 40
    assert b.residency.evictions > 0
