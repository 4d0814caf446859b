"""`POST /v1/admin/reload`: take over what has changed in the `--config` file, without a restart."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pydantic
from fastapi import APIRouter
from pydantic_settings import SettingsError
from starlette.requests import Request
from starlette.responses import Response

from server.api.face import Face, face_of
from server.api.operation import Operation
from server.config import Settings
from server.errors import Conflict, InvalidRequest
from server.log import set_level
from server.telemetry.audit import audit

router = APIRouter()


class Reloaded(msgspec.Struct, frozen=True):
    """`changed`: the new values. `needs_restart`: settings whose new value is not used before a restart."""

    changed: dict[str, Any]
    needs_restart: list[str]


@router.post("/v1/admin/reload")
@Operation({200: Reloaded}, scopes=("admin",))
async def reload(request: Request) -> Response:
    face = face_of(request)
    audit("settings.reload", request)
    if face.settings.config is None:
        raise Conflict("This server was started without --config, so there is no file to read again.")
    reloaded = _take(face, await asyncio.to_thread(_read, face.settings))
    return Response(msgspec.json.encode(reloaded), media_type="application/json")


def _read(settings: Settings) -> Settings:
    """Raises InvalidRequest naming the setting; nothing has changed then."""
    try:
        return settings.reread()
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise InvalidRequest(f"{name}: {first['msg'].removeprefix('Value error, ')}", param=name) from error
    except SettingsError as error:
        raise InvalidRequest("config: the file cannot be read", param="config") from error


def _take(face: Face, new: Settings) -> Reloaded:
    settings, changed, others = face.settings.taking(new)
    face.settings = settings
    face.engine.configure(settings)
    if "log_level" in changed:
        set_level(settings.log_level)
    return Reloaded(changed, others)
