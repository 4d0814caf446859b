"""Residency: where each adapter version's weights are now (disk, host, arena), and who may use them.

`Residency` is the scheduler's `AdapterGate`. The engine's thread owns everything here; the loader's threads
only read files and copy tensors, and what they finish waits until `poll` takes it in at the start of a step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

from server.config import Limits
from server.lora.arena import Arena, Extent
from server.lora.copies import Copies, HostCopies
from server.lora.host_cache import HostCache
from server.lora.layout import Layout, RecentLayouts
from server.lora.loader import Check, Job, Loaded, Loader
from server.lora.pins import Pins
from server.lora.promises import Promises
from server.lora.residents import Residents
from server.lora.version import Place, Version
from server.messages import AdapterRef, ErrorCode, Location, LoraTarget
from server.peft.digest import check_digest
from server.scheduling.adapter_gate import Acquire, AcquireStatus

_MAX_PREFETCHES = 16  # jobs ahead of need at one time; more would push each other out of the host cache
_MAX_LAYOUTS = 10_000  # versions that need not be judged again: 120 MB for a model of 224 modules

_READY, _PENDING, _FULL = (
    Acquire(AcquireStatus.READY),
    Acquire(AcquireStatus.PENDING),
    Acquire(AcquireStatus.FULL),
)


class Residency:
    """Brings adapter versions to where they are needed, and decides which ones leave. An `AdapterGate`.

    `copies` is the way from the host to the arena (default: both are the same memory). `host_bytes` bounds
    the packed images kept on the host; what finds no room among them goes into the arena all the same. `wake`
    is called by a worker after each finished job. Pins may hold `pinned_share` of the arena. Only one thread
    may call this. Raises ValueError when so much memory cannot be had for the host's images.
    """

    def __init__(
        self,
        arena: Arena,
        targets: Sequence[LoraTarget],
        host_bytes: int,
        limits: Limits,
        *,
        pinned_share: float = 1.0,
        copies: Copies | None = None,
        threads: int = 1,
        check: Check = check_digest,
        wake: Callable[[], None] | None = None,
    ) -> None:
        self.arena = arena
        self._copies = copies or HostCopies()
        self._versions: dict[str, Version] = {}
        self._residents = Residents(arena, left=self._settle)
        self.host = HostCache(host_bytes, self._copies)
        self._layouts = RecentLayouts(_MAX_LAYOUTS)
        self._promises = Promises()
        self._pins = Pins(pinned_share, arena.bytes_total)
        self._ahead: OrderedDict[str, AdapterRef] = OrderedDict()  # judged, to be read to the host
        self._jobs = 0
        self._loader = Loader(
            targets,
            arena.dtype,
            self._copies,
            threads=threads,
            wake=wake,
            limits=limits,
            check=check,
        )

    # for the scheduler

    def prefetch(self, ref: AdapterRef) -> None:
        """Begin to bring a version to the host, unless it is further along or many reads are under way."""
        version, may_read = self._version(ref), self._jobs < _MAX_PREFETCHES
        if ref.digest in self.host:
            self.host.touch(ref.digest)
        elif may_read and version.place is Place.DISK and not self._promises.failed(ref.digest):
            self._read(version)
        self._tidy(version)

    def acquire(self, refs: tuple[AdapterRef, ...]) -> Acquire:
        """Take a use of every version of a mix, or of none.

        READY: all are resident; give them back with `release`. PENDING: ask again at the next step, or call
        `cancel`; until then nothing of the mix is evicted. FULL, FAILED: nothing is kept for the caller.
        """
        versions = [self._version(ref) for ref in refs]
        answer = self._bring(versions)
        if answer.status is AcquireStatus.READY:
            for version in versions:
                version.uses += 1
                if version.goes is Place.HOST:  # a deleted one still goes to disk at its last use
                    version.stay()
                self._residents.touch(version.digest)
        self._answered(versions, answer)
        return answer

    def cancel(self, refs: tuple[AdapterRef, ...]) -> None:
        """Nobody who was answered PENDING for this mix will come back."""
        self._end_promise(frozenset(ref.digest for ref in refs))

    @property
    def promises(self) -> Collection[frozenset[str]]:
        """Digests of each mix that was answered PENDING and not asked for again or cancelled since."""
        return self._promises.mixes

    def release(self, refs: tuple[AdapterRef, ...]) -> None:
        """Give back what an `acquire` that was READY took."""
        for ref in refs:
            version = self._versions[ref.digest]
            if version.uses < 1:
                raise ValueError("an adapter was released more often than acquired")
            version.uses -= 1
            self._residents.touch(ref.digest)
            self._leave_if_idle(version)

    def slot(self, digest: str) -> int:
        """The arena's row of a resident version. Raises KeyError when it is not resident."""
        version = self._versions[digest]
        if version.slot is None:
            raise KeyError(digest)
        return version.slot

    # for the engine

    def poll(self) -> bool:
        """Take in what the workers finished, and say if there was anything. Called at the start of a step."""
        self._promises.next_step()
        while self._ahead and self._jobs < _MAX_PREFETCHES:
            self.prefetch(self._ahead.popitem(last=False)[1])
        finished = list(self._loader.finished())
        for loaded in finished:
            self._land(loaded)
        return bool(finished)

    @property
    def pending(self) -> bool:
        """Whether a worker has something to do."""
        return self._jobs > 0

    def load(self, ref: AdapterRef, pin: bool = False) -> Acquire:
        """Bring a version into the arena without using it. While PENDING or FULL, ask again at a later step.

        `pin` keeps it there from then on, until `unload`; FAILED where pins would hold more than their share.
        """
        version = self._version(ref)
        layout = self._layouts.get(ref.digest)
        refusal = self._pins.over_share(version, layout.nbytes) if pin and layout else None
        answer = refusal or self._bring([version])
        if answer.status is AcquireStatus.READY:
            if pin:
                self._pins.add(version, self._layouts[ref.digest].nbytes)
            version.stay()
            self._residents.touch(ref.digest)
        self._answered([version], answer)
        return answer

    def unload(self, digest: str, forget: bool = False) -> Location:
        """Take a version out of the arena, at once or when its last use is released; undoes a pin.

        `forget` drops the host copy too. Returns where it is now.
        """
        version = self._versions.get(digest)
        if version is not None:
            self._pins.remove(version)
            version.unload(forget)
            self._leave_if_idle(version)
        elif forget:
            self.host.drop(digest)
        if forget:
            self._ahead.pop(digest, None)
        return self.where(digest)

    def where(self, digest: str) -> Location:
        if digest in self._residents:
            return "arena"
        return "host" if digest in self.host else "disk"

    def load_ms(self, digest: str) -> float:
        """Work that the version's last way into the arena took, milliseconds; 0 when it is not known."""
        version = self._versions.get(digest)
        return version.load_ms if version is not None else 0.0

    @property
    def resident(self) -> tuple[str, ...]:
        """Digests in the arena, most recently used last."""
        return tuple(version.digest for version in self._residents)

    @property
    def loads(self) -> int:
        """Copies into the arena so far."""
        return self._residents.loads

    @property
    def evictions(self) -> int:
        """Versions that left the arena to make room."""
        return self._residents.evictions

    @property
    def on_host(self) -> tuple[str, ...]:
        """Digests with an image in host memory, in the arena as well or not."""
        return self.host.digests

    @property
    def pinned(self) -> frozenset[str]:
        return self._pins.digests

    @property
    def host_bytes_used(self) -> int:
        """Of the images on the host and of those being read."""
        return self.host.bytes_used

    def close(self) -> None:
        """Stop the workers; what they have begun is finished first."""
        self._loader.close()

    # bringing in

    def _bring(self, versions: list[Version]) -> Acquire:
        """Have every version resident or on its way, with room for all of them or for none. What is here of
        the mix stays meanwhile."""
        versions = list(dict.fromkeys(versions))
        self._promises.add(_mix(versions))
        if failure := self._promises.failure(version.digest for version in versions):
            return failure
        if all(version.in_arena for version in versions):
            return _READY
        layouts = [self._layouts[v.digest] for v in versions if v.digest in self._layouts]
        if (nbytes := sum(layout.nbytes for layout in layouts)) > self.arena.bytes_total:
            return Acquire(
                AcquireStatus.FAILED,
                ErrorCode.NEVER_FITS,
                f"adapters of {nbytes} bytes never fit an arena of {self.arena.bytes_total} bytes",
            )
        if refusal := self._pins.in_the_way(versions, nbytes):
            return refusal
        absent = [version for version in versions if version.extent is None]
        unready = [version for version in absent if version.busy or version.digest not in self._layouts]
        if unready:  # how much room they need is known when all were judged
            self._read_all(unready)
        elif absent and not self._copy_all(absent):
            return _FULL
        return _PENDING

    def _read_all(self, versions: list[Version]) -> None:
        for version in versions:
            if not version.busy:
                self._read(version)

    def _copy_all(self, versions: list[Version]) -> bool:
        """All or, where they do not have room together, none."""
        needs = [self._layouts[version.digest].nbytes for version in versions]
        extents = self._residents.reserve(needs, self._may_leave_arena)
        if extents is None:
            return False
        for version, extent in zip(versions, extents, strict=True):
            self._copy(version, extent)
        return True

    def _may_leave_arena(self, version: Version) -> bool:
        return not (version.uses or version.pinned or version.digest in self._promises)

    def _may_leave_host(self, digest: str) -> bool:
        if digest in self._residents:
            return True
        version = self._versions.get(digest)
        return not (digest in self._promises or (version and version.busy))

    def _read(self, version: Version) -> None:
        """Judge it if it is not; else bring it to the host, if there is room."""
        digest, layout = version.digest, self._layouts.get(version.digest)
        if layout is None or self.host.reserve(digest, layout.nbytes, self._may_leave_host):
            version.read()
            self._submit(Job(digest, version.path, layout, self.host.pieces(digest), content=version.content))

    def _copy(self, version: Version, extent: Extent) -> None:
        """Bring it into its extent of the arena, and to the host on the way, if there is room."""
        digest, layout = version.digest, self._layouts[version.digest]
        packed = digest in self.host
        if not packed:
            self.host.reserve(digest, layout.nbytes, self._may_leave_host)
        version.copy(extent)
        room, after = self.arena.room(extent), self._copies.mark()
        pieces = self.host.pieces(digest)
        self._submit(Job(digest, version.path, layout, pieces, packed, room, after, version.content))

    def _submit(self, job: Job) -> None:
        self._jobs += 1
        self._loader.submit(job)

    def _land(self, loaded: Loaded) -> None:
        """Enter a finished job into the books."""
        version = self._versions[loaded.digest]
        self._jobs -= 1
        if loaded.layout is None:
            self._fail(version, loaded)
        else:
            version.spent_ms += loaded.milliseconds
            self._arrive(version, loaded.layout)
        self._leave_if_idle(version)

    def _arrive(self, version: Version, layout: Layout) -> None:
        self._layouts.remember(version.digest, layout)
        if self.host.pieces(version.digest):
            self.host.keep(version.digest)
        if version.place is Place.COPYING:
            self._residents.enter(version, layout)
            version.load_ms, version.spent_ms = version.spent_ms, 0.0
            return
        version.settle(self._place_without_arena(version.digest))
        if version.place is Place.DISK and version.goes is not Place.DISK:
            # It was judged. The next step reads it ahead of need, unless this one brings it in.
            ref = AdapterRef(version.digest, version.path, content=version.content)
            self._ahead[version.digest] = ref

    def _fail(self, version: Version, loaded: Loaded) -> None:
        """Give the room back, and keep the reason for those who wait; a later request tries again."""
        version.spent_ms = 0.0
        self._layouts.forget(version.digest)  # it may have been judged while its files were not its own
        if version.digest not in self.host:
            self.host.drop(version.digest)
        if version.extent is not None:
            self.arena.abandon(version.extent)
        version.settle(self._place_without_arena(version.digest))
        self._promises.fail(version.digest, Acquire(AcquireStatus.FAILED, loaded.error, loaded.message))

    # waiting and leaving

    def _answered(self, versions: list[Version], answer: Acquire) -> None:
        if answer.status is not AcquireStatus.PENDING:
            self._end_promise(_mix(versions))
        for version in versions:
            self._tidy(version)

    def _end_promise(self, mix: frozenset[str]) -> None:
        for digest in self._promises.remove(mix):
            self._leave_if_idle(self._versions[digest])

    def _leave_if_idle(self, version: Version) -> None:
        """Carry out an `unload` that had to wait."""
        goes, needed = version.goes, version.uses or version.busy or version.digest in self._promises
        if goes is not None and not needed:
            if version.in_arena:
                self._residents.evict(version)
            if goes is Place.DISK:
                self._forget(version)
            version.stay()
        self._tidy(version)

    def _forget(self, version: Version) -> None:
        self.host.drop(version.digest)
        if version.place is Place.HOST:
            version.settle(Place.DISK)

    def _settle(self, version: Version) -> None:
        """It has left the arena."""
        version.settle(self._place_without_arena(version.digest))
        self._tidy(version)

    def _place_without_arena(self, digest: str) -> Place:
        return Place.HOST if digest in self.host else Place.DISK

    def _version(self, ref: AdapterRef) -> Version:
        version = self._versions.get(ref.digest)
        if version is None:
            place = self._place_without_arena(ref.digest)
            version = self._versions[ref.digest] = Version(ref.digest, ref.path, place, ref.content)
        version.path = ref.path  # the content of a digest never changes, its folder may
        return version

    def _tidy(self, version: Version) -> None:
        """Keep no books on a version that nobody awaits and that is nowhere but on disk or on the host."""
        if version.place in (Place.DISK, Place.HOST) and version.digest not in self._promises:
            self._versions.pop(version.digest, None)


def _mix(versions: list[Version]) -> frozenset[str]:
    return frozenset(version.digest for version in versions)
