"""`POST /v1/admin/reload`: take over what has changed in the `--config` file and in the certificate's files,
without a restart."""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Any

import msgspec
import pydantic
from fastapi import APIRouter
from pydantic_settings import SettingsError
from starlette.requests import Request
from starlette.responses import Response

from server.api.face import Face, face_of
from server.api.operation import Operation
from server.api.tls import tls_context
from server.base_model import StartError
from server.config import Settings
from server.errors import Conflict, InvalidRequest
from server.log import set_level
from server.telemetry.audit import audit

logger = logging.getLogger(__name__)

router = APIRouter()


class Reloaded(msgspec.Struct, frozen=True):
    """`changed`: the new values. `needs_restart`: settings whose new value is not used before a restart.
    `certificate`: whether connections that begin now are served by files of TLS that were read again."""

    changed: dict[str, Any]
    needs_restart: list[str]
    certificate: bool


@router.post("/v1/admin/reload")
@Operation({200: Reloaded}, scopes=("admin",))
async def reload(request: Request) -> Response:
    face = face_of(request)
    audit("settings.reload", request)
    if face.settings.config is None and face.tls is None:
        raise Conflict(
            "This server was started without --config and --ssl-certfile, so there is no file to read again."
        )
    new, tls = await asyncio.to_thread(_read, face.settings)
    reloaded = _take(face, new, tls)
    return Response(msgspec.json.encode(reloaded), media_type="application/json")


def _read(settings: Settings) -> tuple[Settings, ssl.SSLContext | None]:
    """All files, before anything of them is taken over. Raises InvalidRequest naming the setting."""
    return _read_config(settings), _read_tls(settings)


def _read_config(settings: Settings) -> Settings:
    try:
        return settings.reread()
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise InvalidRequest(f"{name}: {first['msg'].removeprefix('Value error, ')}", param=name) from error
    except SettingsError as error:
        raise InvalidRequest("config: the file cannot be read", param="config") from error


def _read_tls(settings: Settings) -> ssl.SSLContext | None:
    """From the files named at start: another name for them is a setting that waits for a restart."""
    try:
        return tls_context(settings)
    except StartError as error:
        logger.error("the certificate stays as it was: %s", error.message)  # with paths, which no answer has
        raise InvalidRequest(
            "ssl_certfile: the certificate, its key or --ssl-ca-certs do not do; the server's log says why. "
            "Nothing has changed.",
            param="ssl_certfile",
        ) from error


def _take(face: Face, new: Settings, tls: ssl.SSLContext | None) -> Reloaded:
    settings, changed, others = face.settings.taking(new)
    face.settings, face.tls = settings, tls
    face.engine.configure(settings)
    face.waiting_room.limit = settings.max_waiting_requests
    if "log_level" in changed:
        set_level(settings.log_level)
    return Reloaded(changed, others, tls is not None)
