"""What the routes work with: one object, made at start, which a route reaches by `face_of(request)`."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.requests import Request

from server.access.keyring import Keyring
from server.api.background import Background
from server.api.body import BodyRoom
from server.api.caller import caller_of
from server.api.drain import Drain
from server.api.inference.chat_text import ChatStyle
from server.api.reading.readers import Readers
from server.api.waiting_room import WaitingRoom
from server.base_model import BaseModel
from server.border.client import EngineClient
from server.config import Settings
from server.errors import Unavailable
from server.messages import EngineInfo, ErrorCode
from server.registry.records import AdapterVersion, LastLoad
from server.registry.registry import Registry
from server.registry.sources.table import Sources
from server.telemetry.audit import AuditLog
from server.telemetry.metrics import Metrics
from server.text.tokenizer import Tokenizer
from server.turns import Turns
from server.usage.ledger import UsageLedger
from server.usage.quotas import Quota, Quotas, Subject

logger = logging.getLogger(__name__)

_REMEMBERED_NAMES = 4096
_RECENT_S = 1.5  # how long an engine that could serve waits for adapters that are not pinned


class AdapterNames:
    """Digest -> the name it was last used by. Bounded: figures name what is in use, not all."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, str] = OrderedDict()

    def remember(self, digest: str, name: str) -> None:
        self._names[digest] = name
        self._names.move_to_end(digest)
        if len(self._names) > _REMEMBERED_NAMES:
            self._names.popitem(last=False)

    def name_of(self, digest: str) -> str:
        return self._names.get(digest, digest[:12])


@dataclass
class Face:
    settings: Settings
    base: BaseModel
    engine: EngineClient
    tokenizer: Tokenizer | None
    readers: Readers
    metrics: Metrics
    sources: Sources
    style: ChatStyle = field(default_factory=ChatStyle)
    drain: Drain = field(default_factory=Drain)
    background: Background = field(default_factory=Background)
    names: AdapterNames = field(default_factory=AdapterNames)
    audit_log: AuditLog = field(default_factory=AuditLog)
    body_room: BodyRoom = field(default_factory=BodyRoom)
    upload_turns: Turns = field(default_factory=Turns)
    uploads: int = 0  # that come now
    tls: ssl.SSLContext | None = None  # for connections that begin now
    waiting_room: WaitingRoom = field(init=False)
    keyring: Keyring | None = None  # open when the data folder is
    usage: UsageLedger | None = None  # the same
    quotas: Quotas | None = None  # the same
    registry: Registry | None = None  # open when the engine was ready for the first time
    started: bool = False  # and its pinned adapters were brought in, as far as that could be done
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.waiting_room = WaitingRoom(self.settings.max_waiting_requests)
        self.metrics.watch_queue(lambda: self.waiting_room.waiting, lambda: self.waiting_room.limit)

    @property
    def status(self) -> str:
        """One word: `ready` when inference requests are taken, else why they are not."""
        if self.drain.draining:
            return "draining"
        if self.engine.state != "ready":
            return self.engine.state
        if self.registry is None or not self.started:
            return "starting"
        return "ready" if self.engine.healthy else "unresponsive"

    @property
    def ready(self) -> bool:
        """Takes inference requests: the engine runs and shows life, and the server stays."""
        return self.status == "ready"

    def require_engine(self) -> EngineInfo:
        """What the engine is. Raises Unavailable when requests cannot be taken now."""
        self.drain.check()
        if self.engine.info is None or not self.ready:
            raise self._not_ready()
        return self.engine.info

    def require_answers(self) -> None:
        """Raises Unavailable while the engine shows no life, when a call to it would wait and wait."""
        if self.engine.state == "ready" and not self.engine.healthy:
            raise self._not_ready()

    def require_registry(self) -> Registry:
        """Raises Unavailable before the registry is open."""
        if self.registry is None:
            raise self._not_ready()
        return self.registry

    def quota_of(self, tenant: str) -> Quota | None:
        return self.quotas.get(Subject("tenant", tenant)) if self.quotas is not None else None

    async def restore_adapters(self, resident: Sequence[str] = ()) -> None:
        """Bring adapters (back) into the arena before a new engine is ready: pinned ones, then those of the
        digests `resident`, most recently used last, as far as a moment allows. One that fails is logged, and
        its record says so."""
        if self.registry is None:
            return
        pinned = self.registry.pinned()
        unpinned = set(resident) - {version.digest for version in pinned}
        others = {version.digest: version for version in self.registry.current_of(unpinned)}
        recent = [others[digest] for digest in reversed(resident) if digest in others]
        loaded = sum([await self._restore(version, pin=True) for version in pinned])
        done = await self._restore_recent(recent)
        if pinned or recent:
            logger.info("%d of %d pinned adapters are loaded, %d others", loaded, len(pinned), done)

    async def _restore_recent(self, versions: Sequence[AdapterVersion]) -> int:
        """In this order, for a moment; how many are loaded."""
        asked = loaded = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_RECENT_S):
                for version in versions:
                    loaded += await self._restore(version, pin=False)
                    asked += 1
        if asked < len(versions):
            logger.info("%d adapters are left to come back when they are asked for", len(versions) - asked)
        return loaded

    async def _restore(self, version: AdapterVersion, *, pin: bool) -> bool:
        """Whether it is loaded. One that is damaged is marked so."""
        self.names.remember(version.digest, version.label)
        result = await self.engine.load_adapter(version.ref(), pin=pin)
        if result.error is None:
            return True
        kind = "pinned adapter" if pin else "adapter"
        logger.error("%s %s could not be loaded: %s", kind, version.label, result.message)
        registry = self.require_registry()
        registry.loaded(version.digest, LastLoad(error=result.message))
        if result.error is ErrorCode.ADAPTER_DAMAGED:
            await asyncio.to_thread(registry.damage.recheck, version)
        return False

    def _not_ready(self) -> Unavailable:
        return Unavailable(
            f"The engine is not ready ({self.status}).",
            code="engine_not_ready",
            retry_after_s=self.engine.retry_after_s,
        )


def tenant_of(request: Request) -> str:
    """Who asks, for fairness and shares; "" on a server that asks nobody for a key."""
    keyring = face_of(request).keyring
    return caller_of(request).tenant if keyring is not None and keyring.asks else ""


def face_of(request: Request) -> Face:
    face: Face = request.app.state.face
    return face
