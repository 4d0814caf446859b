"""Residency: where each adapter version's weights are now (disk, host, arena), and who may use them.

`Residency` is the scheduler's `AdapterGate`. The engine's thread owns everything here; the loader's threads
only read files and copy tensors, and what they finish waits until `poll` takes it in at the start of a step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from server.lora.arena import Arena
from server.lora.copies import Copies, HostCopies
from server.lora.host_cache import HostCache
from server.lora.layout import RecentLayouts
from server.lora.loader import Job, Loaded, Loader
from server.lora.pending import PendingMixes
from server.lora.residents import Residents, Version
from server.messages import AdapterRef, ErrorCode, LoraTarget
from server.messages import Residency as Place
from server.peft.format import MAX_HEADER_BYTES, MAX_TENSORS
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
    is called by a worker after each finished job. Only one thread may call this. Raises ValueError when so
    much memory cannot be had for the host's images.
    """

    def __init__(
        self,
        arena: Arena,
        targets: Sequence[LoraTarget],
        host_bytes: int,
        *,
        copies: Copies | None = None,
        threads: int = 1,
        wake: Callable[[], None] | None = None,
        max_header_bytes: int = MAX_HEADER_BYTES,
        max_tensors: int = MAX_TENSORS,
    ) -> None:
        self.arena = arena
        self._copies = copies or HostCopies()
        self._versions: dict[str, Version] = {}
        self._residents = Residents(arena, left=self._tidy)
        self.host = HostCache(host_bytes, self._copies)
        self._layouts = RecentLayouts(_MAX_LAYOUTS)
        self._waited_for = PendingMixes()
        self._ahead: OrderedDict[str, AdapterRef] = OrderedDict()  # judged, to be read to the host
        self._jobs = 0
        self._told: list[Version] = []  # whose failure was reported since the last poll
        self._loader = Loader(
            targets,
            arena.dtype,
            self._copies,
            threads=threads,
            wake=wake,
            max_header_bytes=max_header_bytes,
            max_tensors=max_tensors,
        )

    # for the scheduler

    def prefetch(self, ref: AdapterRef) -> None:
        """Begin to bring a version to the host, unless it is further along or many reads are under way."""
        version = self._version(ref)
        if ref.digest in self.host:
            self.host.touch(ref.digest)
        elif not (version.busy or version.extent or version.failure) and self._jobs < _MAX_PREFETCHES:
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
                self._residents.touch(version.digest)
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
        for version in self._told:
            version.failure = None
            self._tidy(version)
        self._told.clear()
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

        `pin` keeps it there from then on, until `unload`.
        """
        version = self._version(ref)
        answer = self._bring([version])
        if answer.status is AcquireStatus.READY:
            version.pinned |= pin
            version.leaving = version.forget = False
            self._residents.touch(ref.digest)
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
        elif forget:
            self.host.drop(digest)
        if forget:
            self._ahead.pop(digest, None)
        return self.where(digest)

    def where(self, digest: str) -> Place:
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
        return frozenset(version.digest for version in self._residents if version.pinned)

    @property
    def host_bytes_used(self) -> int:
        """Of the images on the host and of those being read."""
        return self.host.bytes_used

    def close(self) -> None:
        """Stop the workers; what they have begun is finished first."""
        self._loader.close()

    # bringing in

    def _bring(self, versions: list[Version]) -> Acquire:
        """Have every version resident or on its way, with room for all of them or for none."""
        versions = list(dict.fromkeys(versions))
        for version in versions:
            if version.failure is not None:
                self._told.append(version)
                return version.failure
        if all(version.slot is not None for version in versions):
            return _READY
        layouts = [self._layouts[v.digest] for v in versions if v.digest in self._layouts]
        if (nbytes := sum(layout.nbytes for layout in layouts)) > self.arena.bytes_total:
            return Acquire(
                AcquireStatus.FAILED,
                ErrorCode.NEVER_FITS,
                f"adapters of {nbytes} bytes never fit an arena of {self.arena.bytes_total} bytes",
            )
        absent = [version for version in versions if version.extent is None]
        unready = [version for version in absent if version.busy or version.digest not in self._layouts]
        if not unready and absent and not self._reserve(absent, keep=versions):
            return _FULL
        for version in unready or absent:  # how much room they need is known when all were judged
            if not version.busy:
                self._submit(version)
        return _PENDING

    def _reserve(self, versions: list[Version], keep: list[Version]) -> bool:
        """Room in the arena for each version or for none; nothing of `keep` leaves for it."""

        def may_leave(other: Version) -> bool:
            held = other.uses or other.pinned or other.digest in self._waited_for
            return not held and other not in keep

        needs = [self._layouts[version.digest].nbytes for version in versions]
        return self._residents.reserve(versions, needs, may_leave)

    def _may_leave_host(self, digest: str) -> bool:
        if digest in self._residents:
            return True
        version = self._versions.get(digest)
        return not (digest in self._waited_for or (version and version.busy))

    def _submit(self, version: Version) -> None:
        """Judge it if it is not; else bring it where there is room: into the arena, to the host or both."""
        digest, layout = version.digest, self._layouts.get(version.digest)
        packed = digest in self.host
        if layout is not None and not packed:
            reserved = self.host.reserve(digest, layout.nbytes, self._may_leave_host)
            if not reserved and version.extent is None:
                return
        room = after = None
        if version.extent is not None:
            room, after = self.arena.room(version.extent), self._copies.mark()
        version.busy = True
        self._jobs += 1
        self._loader.submit(Job(digest, version.path, layout, self.host.pieces(digest), packed, room, after))

    def _land(self, loaded: Loaded) -> None:
        """Enter a finished job into the books."""
        version = self._versions[loaded.digest]
        version.busy = False
        self._jobs -= 1
        if loaded.layout is None:
            self._fail(version, loaded)
            return
        self._layouts.remember(version.digest, loaded.layout)
        version.spent_ms += loaded.milliseconds
        if self.host.pieces(version.digest):
            self.host.keep(version.digest)
        if version.extent is not None:
            self._residents.enter(version, loaded.layout)
            version.load_ms, version.spent_ms = version.spent_ms, 0.0
        elif version.digest not in self.host and not version.forget:
            # It was judged. The next step reads it ahead of need, unless this one brings it in.
            self._ahead[version.digest] = AdapterRef(version.digest, version.path)
        self._leave_if_idle(version)

    def _fail(self, version: Version, loaded: Loaded) -> None:
        """Give the room back, and keep the reason for those who wait; a later request tries again."""
        version.spent_ms = 0.0
        self._layouts.forget(version.digest)  # it may have been judged while its files were not its own
        if version.digest not in self.host:
            self.host.drop(version.digest)
        self._residents.abandon(version)
        if version.digest in self._waited_for:
            version.failure = Acquire(AcquireStatus.FAILED, loaded.error, loaded.message)
        self._leave_if_idle(version)

    # waiting and leaving

    def _settle(self, versions: list[Version], answer: Acquire) -> None:
        mix = frozenset(version.digest for version in versions)
        if answer.status is AcquireStatus.PENDING:
            self._waited_for.add(mix)
        else:
            self._stop_waiting(mix)
        for version in versions:
            self._tidy(version)

    def _stop_waiting(self, mix: frozenset[str]) -> None:
        for digest in self._waited_for.remove(mix):
            version = self._versions[digest]
            if version not in self._told:  # the others of this step are told as well
                version.failure = None
            self._leave_if_idle(version)

    def _leave_if_idle(self, version: Version) -> None:
        """Carry out an `unload` that had to wait."""
        if version.leaving and not (version.uses or version.busy or version.digest in self._waited_for):
            if version.slot is not None:
                self._residents.evict(version)
            if version.forget:
                self.host.drop(version.digest)
            version.leaving = version.forget = False
        self._tidy(version)

    def _version(self, ref: AdapterRef) -> Version:
        version = self._versions.get(ref.digest)
        if version is None:
            version = self._versions[ref.digest] = Version(ref.digest, ref.path)
        version.path = ref.path  # the content of a digest never changes, its folder may
        return version

    def _tidy(self, version: Version) -> None:
        """Keep no books on a version that nobody asks for and that is nowhere but on disk and on the host."""
        if version.blank and version.digest not in self._waited_for:
            self._versions.pop(version.digest, None)
