"""The one door: whoever asks for anything but the probes passes here, before a route is looked for."""

from __future__ import annotations

import ipaddress
import logging
import time
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.access.keyring import Keyring
from server.api.errors import error_response
from server.api.face import Face
from server.base_model import StartError
from server.config import Settings
from server.errors import ChorusError, Unauthorized, Unavailable

_TENANT_HEADER = "x-chorus-tenant"
_LOG_SECONDS = 10.0  # between two lines about wrong keys

logger = logging.getLogger(__name__)


class Door:
    """ASGI middleware inside RequestScope. Puts the `Caller` into the request's state, or refuses.

    Nothing about a request opens it but a path that is, letter for letter, one of `open_paths`. All else
    needs a right key first: routes, documents, unknown paths, wrong methods. What that key may do is said by
    the Operation of the endpoint, where the router has found it (`Operation.__call__`). Nothing is read of
    the body of a request that is refused.
    """

    def __init__(self, app: ASGIApp, open_paths: frozenset[str] = frozenset()) -> None:
        self._app = app
        self._open_paths = open_paths
        self._refusals = _Refusals()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._admit(scope)
            except ChorusError as error:
                await error_response(error)(scope, receive, send)
                return
        elif scope["type"] != "lifespan":  # a WebSocket: nothing here speaks it
            await send({"type": "websocket.close", "code": 1008})
            return
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        """Raises Unauthorized, what `acting_for` raises, and Unavailable before the keys are read."""
        if scope["path"] in self._open_paths:
            return
        face: Face = scope["app"].state.face
        if face.keyring is None:
            raise Unavailable("The server is starting.", code="engine_not_ready")
        headers = Headers(scope=scope)
        state = scope.setdefault("state", {})
        try:
            caller = face.keyring.identify(_presented(headers))
        except Unauthorized:
            state["quiet"] = True  # a line for each try would let anybody fill the log
            self._refusals.count(scope)
            raise
        state |= {"caller": caller, "tenant": caller.tenant, "key_id": caller.key_id}
        if (tenant := headers.get(_TENANT_HEADER)) is not None:
            caller = caller.acting_for(tenant)
            state |= {"caller": caller, "tenant": caller.tenant}


class _Refusals:
    """Says in the log that wrong keys come, now and then, however many they are."""

    def __init__(self) -> None:
        self._refused = 0
        self._due = 0.0  # monotonic seconds

    def count(self, scope: Scope) -> None:
        self._refused += 1
        if (now := time.monotonic()) >= self._due:
            client = (scope.get("client") or ("unknown",))[0]
            logger.warning("requests without a valid API key: %d, the last from %s", self._refused, client)
            self._refused, self._due = 0, now + _LOG_SECONDS


def check_host(settings: Settings, keyring: Keyring, data_dir: Path) -> None:
    """Raises StartError for a server that others can reach and that would ask them for nothing."""
    if keyring.asks and not keyring.usable:
        logger.warning("every API key is revoked or expired: `chorus keys create` makes one")
    if keyring.asks or not settings.auth or is_loopback(settings.host):
        return
    raise StartError(
        f"--host {settings.host}: others can reach this address, and there is no API key: make one by "
        f"`chorus keys create --scope admin --data-dir {data_dir}`, give one by --api-key, or say --no-auth."
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _face(scope: Scope) -> Face:
    face: Face = scope["app"].state.face
    return face


def _presented(headers: Headers) -> str | None:
    """The key in `Authorization: Bearer`, else in `x-api-key`."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return key.strip()
    return headers.get("x-api-key")
