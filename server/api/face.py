"""What the routes work with: one object, made at start, which a route reaches by `face_of(request)`."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from starlette.requests import Request

from server.api.background import Background
from server.api.drain import Drain
from server.base_model import BaseModel
from server.border.client import EngineClient
from server.config import Settings
from server.errors import InvalidRequest, Unavailable
from server.messages import AdapterRef, EngineInfo
from server.registry.registry import Registry
from server.registry.sources.table import Sources
from server.telemetry.metrics import Metrics
from server.text.chat_template import ChatTemplate
from server.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_REMEMBERED_NAMES = 4096


class AdapterNames:
    """Digest -> the name it was last asked for by. Bounded: figures name what is in use, not all."""

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
    template: ChatTemplate | None
    metrics: Metrics
    sources: Sources
    drain: Drain = field(default_factory=Drain)
    background: Background = field(default_factory=Background)
    names: AdapterNames = field(default_factory=AdapterNames)
    registry: Registry | None = None  # open when the engine was ready for the first time
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def status(self) -> str:
        """One word: `ready` when inference requests are taken, else why they are not."""
        if self.drain.draining:
            return "draining"
        if self.engine.state != "ready":
            return self.engine.state
        if self.registry is None:
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

    def require_tokenizer(self, param: str) -> Tokenizer:
        """Raises InvalidRequest naming `param`, the field that needs a tokenizer."""
        if self.tokenizer is None:
            raise InvalidRequest(
                f"{param}: this server's model has no tokenizer; send token ids", param=param
            )
        return self.tokenizer

    async def restore_pins(self, _: object = None) -> None:
        """Bring pinned adapters (back) into the arena, each time an engine is new. Failures are logged."""
        for version in self.registry.pinned() if self.registry else []:
            result = await self.engine.load_adapter(AdapterRef(version.digest, str(version.path)), pin=True)
            if result.error is not None:
                logger.error("pinned adapter %s could not be loaded: %s", version.name, result.message)

    def _not_ready(self) -> Unavailable:
        return Unavailable(
            f"The engine is not ready ({self.status}).",
            code="engine_not_ready",
            retry_after_s=self.engine.retry_after_s,
        )


def face_of(request: Request) -> Face:
    face: Face = request.app.state.face
    return face
