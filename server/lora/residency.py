"""Residency: where each adapter version's weights are now (disk, host, arena), and who may use them.

`Residency` is the scheduler's `AdapterGate`. The engine's thread owns everything here; the loader's threads
only read files and copy tensors, and what they finish waits until `poll` takes it in at the start of a step.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from server.engine.adapter_gate import Acquire, AcquireStatus
from server.engine.messages import AdapterRef, ErrorCode, LoraTarget
from server.engine.messages import Residency as Place
from server.lora.arena import Arena, Extent
from server.lora.loader import Job, Loaded, Loader
from server.lora.pack import PackedAdapter
from server.registry.peft_format import MAX_HEADER_BYTES, MAX_TENSORS

_MAX_PREFETCHES = 16  # reads ahead of need at one time; more would push each other out of the host cache
_MAX_SIZES = 100_000  # versions whose packed size is remembered


_READY, _PENDING, _FULL = (
    Acquire(AcquireStatus.READY),
    Acquire(AcquireStatus.PENDING),
    Acquire(AcquireStatus.FULL),
)


@dataclass(eq=False)
class _Version:
    """What is known of one adapter version that is on the host, in the arena, or on its way."""

    digest: str
    path: str
    busy: bool = False  # a worker reads or copies it
    packed: PackedAdapter | None = None  # host image
    extent: Extent | None = None  # reserved; being filled, or resident when there is a slot
    slot: int | None = None
    uses: int = 0  # by sequences
    pinned: bool = False
    leaving: bool = False  # leaves the arena when nobody uses it
    forget: bool = False  # and the host as well
    failure: Acquire | None = None  # of the last load, until those who wait were told
    spent_ms: float = 0.0  # of work towards the next landing
    load_ms: float = 0.0  # work that the last landing in the arena took

    @property
    def blank(self) -> bool:
        held = self.busy or self.packed or self.extent or self.uses or self.pinned or self.failure
        return not held


class Residency:
    """Brings adapter versions to where they are needed, and decides which ones leave. An `AdapterGate`.

    `host_bytes` bounds the packed images kept on the host (only images that somebody waits for may exceed
    it for a while). `wake` is called by a worker after each finished load. Only one thread may call this.
    """

    def __init__(
        self,
        arena: Arena,
        targets: Sequence[LoraTarget],
        host_bytes: int,
        *,
        threads: int = 1,
        wake: Callable[[], None] | None = None,
        max_header_bytes: int = MAX_HEADER_BYTES,
        max_tensors: int = MAX_TENSORS,
    ) -> None:
        self.arena = arena
        self.host_bytes = host_bytes
        self.loads = 0  # copies into the arena so far
        self.evictions = 0
        self._versions: dict[str, _Version] = {}
        self._resident: OrderedDict[str, None] = OrderedDict()  # least recently used first
        self._on_host: OrderedDict[str, None] = OrderedDict()  # the same
        self._host_bytes_used = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()  # packed bytes, learnt at the first read
        self._waiting: set[frozenset[str]] = set()  # mixes that were told PENDING
        self._waiters: Counter[str] = Counter()  # how many of those a digest is in
        self._jobs = 0
        self._told: list[_Version] = []  # whose failure was reported since the last poll
        self._loader = Loader(
            targets,
            arena.dtype,
            arena.device,
            threads=threads,
            wake=wake,
            max_header_bytes=max_header_bytes,
            max_tensors=max_tensors,
        )

    # for the scheduler

    def prefetch(self, ref: AdapterRef) -> None:
        """Begin to read a version from disk, unless it is further along or many reads are under way."""
        version = self._version(ref)
        if version.packed is not None:
            self._on_host.move_to_end(ref.digest)
        elif not (version.busy or version.extent or version.failure) and self._may_prefetch:
            self._submit(version)
        self._tidy(version)

    def acquire(self, refs: tuple[AdapterRef, ...]) -> Acquire:
        """Take a use of every version of a mix, or of none.

        READY: all are resident; give them back with `release`. PENDING: ask again at the next step, or call
        `cancel`; until then nothing of the mix is evicted. FULL, FAILED: nothing is held for the caller.
        """
        versions = [self._version(ref) for ref in refs]
        answer = self._bring(versions)
        if answer.status is AcquireStatus.READY:
            for version in versions:
                version.uses += 1
                version.leaving = version.forget  # of a deleted version, the memory is freed at its last use
                self._resident.move_to_end(version.digest)
        self._settle(versions, answer)
        return answer

    def cancel(self, refs: tuple[AdapterRef, ...]) -> None:
        """A caller that was told PENDING will not come back. Others that wait for the same mix may."""
        self._stop_waiting(frozenset(ref.digest for ref in refs))

    def release(self, refs: tuple[AdapterRef, ...]) -> None:
        """Give back what an `acquire` that was READY took."""
        for ref in refs:
            version = self._versions[ref.digest]
            if version.uses < 1:
                raise ValueError("an adapter was released more often than acquired")
            version.uses -= 1
            self._resident.move_to_end(ref.digest)
            self._leave_if_idle(version)

    def slot(self, digest: str) -> int:
        """The arena's row of a resident version. Raises KeyError when it is not resident."""
        version = self._versions[digest]
        if version.slot is None:
            raise KeyError(digest)
        return version.slot

    # for the engine

    def poll(self) -> None:
        """Take in what the workers finished. Called at the start of every step."""
        for version in self._told:
            version.failure = None
            self._tidy(version)
        self._told.clear()
        for loaded in self._loader.finished():
            self._land(loaded)
        self._trim_host()

    @property
    def pending(self) -> bool:
        """Whether a worker has something to do."""
        return self._jobs > 0

    def load(self, ref: AdapterRef, pin: bool = False) -> Acquire:
        """Bring a version into the arena without using it. While PENDING or FULL, ask again at a later step.

        `pin` keeps it there from then on, until `unload`.
        """
        version = self._version(ref)
        answer = self._bring([version])
        if answer.status is AcquireStatus.READY:
            version.pinned |= pin
            version.leaving = version.forget = False
            self._resident.move_to_end(ref.digest)
        self._settle([version], answer)
        return answer

    def unload(self, digest: str, forget: bool = False) -> Place:
        """Take a version out of the arena, at once or when its last use is released; undoes a pin.

        `forget` drops the host copy too. Returns where it is now.
        """
        version = self._versions.get(digest)
        if version is not None:
            version.pinned = False
            version.leaving, version.forget = True, version.forget or forget
            self._leave_if_idle(version)
        if forget:
            self._sizes.pop(digest, None)
        return self.where(digest)

    def where(self, digest: str) -> Place:
        version = self._versions.get(digest)
        if version is None or (version.slot is None and version.packed is None):
            return "disk"
        return "host" if version.slot is None else "arena"

    def load_ms(self, digest: str) -> float:
        """Work that the version's last way into the arena took, milliseconds; 0 when it is not known."""
        version = self._versions.get(digest)
        return version.load_ms if version is not None else 0.0

    @property
    def resident(self) -> tuple[str, ...]:
        """Digests in the arena, most recently used last."""
        return tuple(self._resident)

    @property
    def on_host(self) -> tuple[str, ...]:
        """Digests with an image in host memory, in the arena as well or not."""
        return tuple(self._on_host)

    @property
    def pinned(self) -> frozenset[str]:
        return frozenset(digest for digest in self._resident if self._versions[digest].pinned)

    @property
    def host_bytes_used(self) -> int:
        return self._host_bytes_used

    def close(self) -> None:
        """Stop the workers; what they have begun is finished first."""
        self._loader.close()

    # bringing in

    @property
    def _may_prefetch(self) -> bool:
        return self.host_bytes > 0 and self._jobs < _MAX_PREFETCHES

    def _bring(self, versions: list[_Version]) -> Acquire:
        """Have every version resident or on its way, with room for all of them or for none."""
        versions = list(dict.fromkeys(versions))
        for version in versions:
            if version.failure is not None:
                self._told.append(version)
                return version.failure
        if all(version.slot is not None for version in versions):
            return _READY
        sizes = [self._sizes.get(version.digest, 0) for version in versions]
        if sum(sizes) > self.arena.bytes_total:
            return Acquire(
                AcquireStatus.FAILED,
                ErrorCode.NEVER_FITS,
                f"adapters of {sum(sizes)} bytes never fit an arena of {self.arena.bytes_total} bytes",
            )
        absent = [version for version in versions if version.extent is None]
        unread = [version for version in absent if version.busy or version.digest not in self._sizes]
        if not unread and absent and not self._reserve(absent, keep=versions):
            return _FULL
        for version in unread or absent:  # how much room they need is known when all were read once
            if not version.busy:
                self._submit(version)
        return _PENDING

    def _reserve(self, versions: list[_Version], keep: list[_Version]) -> bool:
        """Room for each version or for none, evicting as little as will do and nothing of `keep`."""
        needs = [self._sizes[version.digest] for version in versions]
        idle = [version for version in self._idle() if version not in keep]
        if sum(needs) > self.arena.bytes_free + sum(v.extent.nbytes for v in idle if v.extent):
            return False
        for version, nbytes in zip(versions, needs, strict=True):
            version.extent = self._make_room(nbytes, idle)
            if version.extent is None:
                for other in versions:
                    if other.extent is not None:
                        self.arena.abandon(other.extent)
                        other.extent = None
                return False
        return True

    def _make_room(self, nbytes: int, idle: list[_Version]) -> Extent | None:
        """`idle`: what may be evicted, least recently used first; those evicted are taken out of it."""
        while True:
            extent = self.arena.reserve(nbytes)
            if extent is None and self.arena.bytes_free >= nbytes and self.arena.compact():
                extent = self.arena.reserve(nbytes)
            if extent is not None or not idle:
                return extent
            self.evictions += 1
            self._evict(idle.pop(0))

    def _idle(self) -> Iterator[_Version]:
        """Resident versions that nobody uses, waits for or pinned; least recently used first."""
        for digest in self._resident:
            version = self._versions[digest]
            if not version.uses and not version.pinned and not self._waiters[digest]:
                yield version

    def _submit(self, version: _Version) -> None:
        room = after = None
        if version.extent is not None:
            room = self.arena.room(version.extent)
            if room.is_cuda:
                after = torch.cuda.current_stream(room.device).record_event()
        version.busy = True
        self._jobs += 1
        self._loader.submit(Job(version.digest, version.path, version.packed, room, after))

    def _land(self, loaded: Loaded) -> None:
        """Enter a finished job into the books."""
        version = self._versions[loaded.digest]
        version.busy = False
        self._jobs -= 1
        if loaded.packed is None:
            self._fail(version, loaded)
            return
        self._remember_size(version.digest, loaded.packed.nbytes)
        if version.packed is None:
            version.packed = loaded.packed
            self._host_bytes_used += loaded.packed.nbytes
        self._on_host[version.digest] = None
        self._on_host.move_to_end(version.digest)
        version.spent_ms += loaded.milliseconds
        if version.extent is not None:
            version.slot = self.arena.commit(version.extent, loaded.packed)
            self._resident[version.digest] = None
            self.loads += 1
            version.load_ms, version.spent_ms = version.spent_ms, 0.0
        self._leave_if_idle(version)

    def _fail(self, version: _Version, loaded: Loaded) -> None:
        """Give the room back, and keep the reason for those who wait; a later request tries again."""
        version.spent_ms = 0.0
        if version.extent is not None:
            self.arena.abandon(version.extent)
            version.extent = None
        if self._waiters[version.digest]:
            version.failure = Acquire(AcquireStatus.FAILED, loaded.error, loaded.message)
        self._leave_if_idle(version)

    def _remember_size(self, digest: str, nbytes: int) -> None:
        self._sizes[digest] = nbytes
        self._sizes.move_to_end(digest)
        if len(self._sizes) > _MAX_SIZES:
            self._sizes.popitem(last=False)

    # waiting and leaving

    def _settle(self, versions: list[_Version], answer: Acquire) -> None:
        mix = frozenset(version.digest for version in versions)
        if answer.status is AcquireStatus.PENDING:
            self._wait(mix)
        else:
            self._stop_waiting(mix)
        for version in versions:
            self._tidy(version)

    def _wait(self, mix: frozenset[str]) -> None:
        if mix not in self._waiting:
            self._waiting.add(mix)
            self._waiters.update(mix)

    def _stop_waiting(self, mix: frozenset[str]) -> None:
        if mix not in self._waiting:
            return
        self._waiting.remove(mix)
        for digest in mix:
            self._waiters[digest] -= 1
            if not self._waiters[digest]:
                del self._waiters[digest]
                version = self._versions[digest]
                if version not in self._told:  # the others of this step are told as well
                    version.failure = None
                self._leave_if_idle(version)

    def _leave_if_idle(self, version: _Version) -> None:
        """Carry out an `unload` that had to wait."""
        if version.leaving and not (version.uses or version.busy or self._waiters[version.digest]):
            if version.slot is not None:
                self._evict(version)
            if version.forget:
                self._drop_from_host(version)
            version.leaving = version.forget = False
        self._tidy(version)

    def _evict(self, version: _Version) -> None:
        assert version.slot is not None
        self.arena.release(version.slot)
        version.slot = version.extent = None
        del self._resident[version.digest]
        self._tidy(version)

    def _trim_host(self) -> None:
        """Least recently used images leave the host; those that somebody waits for stay."""
        if self._host_bytes_used <= self.host_bytes:
            return
        for digest in list(self._on_host):
            if self._host_bytes_used <= self.host_bytes:
                return
            version = self._versions[digest]
            if version.slot is not None or not (version.busy or self._waiters[digest]):
                self._drop_from_host(version)

    def _drop_from_host(self, version: _Version) -> None:
        if version.packed is not None:
            self._host_bytes_used -= version.packed.nbytes
            version.packed = None
            del self._on_host[version.digest]
        self._tidy(version)

    def _version(self, ref: AdapterRef) -> _Version:
        version = self._versions.get(ref.digest)
        if version is None:
            version = self._versions[ref.digest] = _Version(ref.digest, ref.path)
        version.path = ref.path  # the content of a digest never changes, its folder may
        return version

    def _tidy(self, version: _Version) -> None:
        """Keep no books on a version that is only on disk and that nobody asks for."""
        if version.blank and not self._waiters[version.digest]:
            self._versions.pop(version.digest, None)
