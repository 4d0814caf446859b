"""Adapters over HTTP: upload, replace, inspect, bring in, take out, delete."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from functools import partial
from typing import TypeVar

import pydantic
from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import Request
from starlette.responses import Response

from server.api.adapters.changes import change_of
from server.api.adapters.upload import UPLOAD_FORM, UPLOADERS, fetch, in_thread, receive
from server.api.adapters.views import (
    AdapterListView,
    AdapterView,
    DeletedView,
    LoadedView,
    Locations,
    PublishedView,
    adapter_view,
    loaded_view,
    published_view,
)
from server.api.body import read_body
from server.api.caller import caller_of
from server.api.face import Face, face_of
from server.api.inference.parsing import from_validation
from server.api.operation import SEE_ADAPTERS, Operation
from server.api.paging import Page
from server.border.client import EngineClient
from server.errors import (
    ChorusError,
    Conflict,
    DamagedAdapter,
    InvalidRequest,
    OutOfMemory,
    PinLimit,
)
from server.messages import AdapterResult, ErrorCode
from server.registry.records import AdapterVersion, LastLoad, Published, Retired, split_version
from server.telemetry.audit import audit

router = APIRouter(tags=["adapters"])

_MAX_JSON_BYTES = 64 * 2**10
_LISTED = 100
_MOST_LISTED = 1000
_DELETE_WAIT_S = 1.0
_UNLOAD_WAIT_S = 5.0
_UNLOAD_POLL_S = 0.05

_log = logging.getLogger(__name__)

Body = TypeVar("Body", bound=pydantic.BaseModel)


class SourceBody(pydantic.BaseModel):
    """Register what `source` names, as `file:` and the path of a folder or an archive on the server."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    name: str
    source: str
    description: str | None = None


class LoadBody(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    pin: bool = False


class AdapterChangeBody(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    shared: bool


class LoadLoraBody(pydantic.BaseModel):
    """As operators' tools send it, with whatever fields besides."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadLoraBody(pydantic.BaseModel):
    lora_name: str


@router.post("/v1/adapters", status_code=201)
@Operation(
    {201: PublishedView}, SourceBody, form=UPLOAD_FORM | {"required": ["name", "files"]}, scopes=("upload",)
)
async def create_adapter(request: Request) -> Response:
    """Upload a new adapter (multipart: `name`, two files or an archive), or register a source (JSON)."""
    face = face_of(request)
    audit("adapter.create", request)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return _published(request, await receive(face, request, name=None, replace=False))
    body = await _json(request, SourceBody)
    audit("adapter.create", request, name=body.name)
    call = partial(
        fetch, face, caller_of(request), body.name, body.source, replace=False, description=body.description
    )
    published = await in_thread(call, UPLOADERS)
    return _published(request, published)


@router.put("/v1/adapters/{name:path}")
@Operation({200: PublishedView, 201: PublishedView}, form=UPLOAD_FORM, scopes=("upload",))
async def replace_adapter(request: Request, name: str) -> Response:
    """Upload a new version; running requests finish on the old one. 201 when the name is new."""
    audit("adapter.replace", request, name=name)
    return _published(request, await receive(face_of(request), request, name=name, replace=True))


@router.get("/v1/adapters")
@Operation({200: AdapterListView}, scopes=SEE_ADAPTERS)
async def list_adapters(request: Request) -> Response:
    """Those of the caller's tenant, and what others share with it, by name."""
    face, tenant = face_of(request), caller_of(request).tenant
    registry = face.require_registry()
    page = Page.of(request, default=_LISTED, most=_MOST_LISTED)
    locations = Locations.of(face.engine.stats)

    def encode() -> bytes:
        """In a thread: there may be many thousands."""
        records = registry.records(tenant=tenant, after=page.after, most=page.wanted)
        parameters = registry.base_parameters
        return page.encode((r.name, adapter_view(r, tenant, parameters, locations)) for r in records)

    return Response(await asyncio.to_thread(encode), media_type="application/json")


@router.get("/v1/adapters/{name:path}")
@Operation({200: AdapterView}, scopes=SEE_ADAPTERS)
async def get_adapter(request: Request, name: str) -> Response:
    face, tenant = face_of(request), caller_of(request).tenant
    return JSONResponse(_view(face, tenant, name))


@router.patch("/v1/adapters/{name:path}")
@Operation({200: AdapterView}, AdapterChangeBody, scopes=("admin",))
async def change_adapter(request: Request, name: str) -> Response:
    """`{"shared": true}` lets every tenant use it, `false` none but its own."""
    face, tenant = face_of(request), caller_of(request).tenant
    registry = face.require_registry()
    body = await _json(request, AdapterChangeBody)
    audit("adapter.share" if body.shared else "adapter.unshare", request, name=name)
    await in_thread(lambda: registry.set_shared(name, body.shared, tenant=tenant))
    return JSONResponse(_view(face, tenant, name))


@router.delete("/v1/adapters/{name:path}")
@Operation({200: DeletedView, 202: DeletedView}, scopes=("manage",))
async def delete_adapter(request: Request, name: str) -> Response:
    """New requests do not find it from now on. 200: it is gone; 202: running requests still use it."""
    face = face_of(request)
    audit("adapter.delete", request, name=name)
    gone = await _delete(face, caller_of(request).tenant, name, _DELETE_WAIT_S)
    return JSONResponse(
        {"object": "adapter", "name": name, "state": "deleted" if gone else "draining"}, 200 if gone else 202
    )


@router.post("/v1/adapters/{name:path}/load")
@Operation({200: LoadedView}, LoadBody, body_required=False, scopes=("manage",))
async def load_adapter(request: Request, name: str) -> Response:
    """Bring it (or `name@version`) into accelerator memory; `{"pin": true}` keeps it there."""
    face, tenant = face_of(request), caller_of(request).tenant
    registry = face.require_registry()
    face.require_answers()
    raw = await read_body(request, _MAX_JSON_BYTES)
    body = _parse(raw, LoadBody) if raw else LoadBody()
    audit("adapter.load", request, name=name, pin=body.pin)
    if body.pin and split_version(name)[1] is not None:
        raise InvalidRequest("A pin is for a name, and follows it to new versions.", param="pin")
    with registry.acquire(name, tenant=tenant, own=True) as lease:
        result = await _load(face, lease.version, body.pin)
        if body.pin:
            await in_thread(lambda: registry.set_pinned(lease.version.name, True, tenant=tenant))
    return JSONResponse(loaded_view(lease.version, result))


@router.post("/v1/adapters/{name:path}/unload")
@Operation({200: LoadedView}, scopes=("manage",))
async def unload_adapter(request: Request, name: str) -> Response:
    """Take it out of accelerator memory and undo a pin. 409 when it is still in use after a few seconds."""
    audit("adapter.unload", request, name=name)
    face, tenant = face_of(request), caller_of(request).tenant
    registry = face.require_registry()
    face.require_answers()
    with registry.acquire(name, tenant=tenant, own=True) as lease:
        version = lease.version
    await in_thread(lambda: registry.set_pinned(version.name, False, tenant=tenant))
    result = await face.engine.unload_adapter(version.digest)
    if result.residency == "arena":
        await _until_out(face.engine, version.digest)
        result = await face.engine.unload_adapter(version.digest)
    return JSONResponse(loaded_view(version, result))


@router.post("/v1/load_lora_adapter")
@Operation({200: str}, LoadLoraBody, scopes=("upload",))
async def load_lora_adapter(request: Request) -> Response:
    """As operators' tools call it: register what `lora_path` names under `lora_name`."""
    face = face_of(request)
    body = await _json(request, LoadLoraBody)
    event = "adapter.replace" if body.load_inplace else "adapter.create"
    audit(event, request, name=body.lora_name)
    call = partial(fetch, face, caller_of(request), body.lora_name, body.lora_path, replace=body.load_inplace)
    try:
        published = await in_thread(call, UPLOADERS)
    except ChorusError as error:
        raise _as_compatible(error) from error
    audit(event, request, **change_of(published))
    _follow_up(face, published)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' is loaded.")


@router.post("/v1/unload_lora_adapter")
@Operation({200: str}, UnloadLoraBody, scopes=("manage",))
async def unload_lora_adapter(request: Request) -> Response:
    """As operators' tools call it: the same as DELETE, without waiting for running requests."""
    face = face_of(request)
    body = await _json(request, UnloadLoraBody)
    audit("adapter.delete", request, name=body.lora_name)
    try:
        await _delete(face, caller_of(request).tenant, body.lora_name, wait_s=0.0)
    except ChorusError as error:
        raise _as_compatible(error) from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' is unloaded.")


# after a change


def _published(request: Request, published: Published) -> Response:
    audit("adapter.replace" if request.method == "PUT" else "adapter.create", request, **change_of(published))
    _follow_up(face_of(request), published)
    return JSONResponse(published_view(published.version), 201 if published.outcome == "created" else 200)


def _follow_up(face: Face, published: Published) -> None:
    if published.retired:
        face.background.start(_forget(face, published.retired))
    if published.outcome == "replaced" and published.pinned:
        face.background.start(_move_pin(face, published.version))


async def _delete(face: Face, tenant: str, name: str, wait_s: float) -> bool:
    """Whether all of it was gone after `wait_s` seconds."""
    registry = face.require_registry()
    retired = await in_thread(lambda: registry.delete(name, tenant=tenant))
    forgetting = face.background.start(_forget(face, retired))
    done, _ = await asyncio.wait({forgetting}, timeout=wait_s)
    return bool(done)


async def _forget(face: Face, retired: tuple[Retired, ...]) -> None:
    """When the last user of each version has left, have the engine drop what no other name needs."""
    registry = face.require_registry()
    for each in retired:
        await asyncio.wrap_future(each.gone)
        if not registry.holds(each.version.digest):
            with suppress(ChorusError):  # an engine that is not there remembers nothing
                await face.engine.unload_adapter(each.version.digest, forget=True)


async def _move_pin(face: Face, version: AdapterVersion) -> None:
    """A pinned name got a new version: that one stays in memory now, the one before it need not."""
    registry = face.require_registry()
    try:
        records = registry.get(version.name, tenant=version.tenant).versions
        before = [each.version for each in records if each.version.number == version.number - 1]
        with registry.acquire(f"{version.name}@{version.number}", tenant=version.tenant):
            try:
                await _load(face, version, pin=True)
            except PinLimit:  # for both at once there is no room among the pins
                await _unload_all(face, before)
                await _load(face, version, pin=True)
        await _unload_all(face, before)
    except ChorusError as error:
        _log.warning("the pin of %s could not be moved to its new version: %s", version.label, error.message)


async def _unload_all(face: Face, versions: list[AdapterVersion]) -> None:
    for version in versions:
        await face.engine.unload_adapter(version.digest)


async def _load(face: Face, version: AdapterVersion, pin: bool) -> AdapterResult:
    """Raises OutOfMemory when there is no room now, InvalidRequest when there never is, PinLimit."""
    face.names.remember(version.digest, version.label)
    result = await face.engine.load_adapter(version.ref(), pin=pin)
    if result.error is ErrorCode.OUT_OF_MEMORY:
        raise OutOfMemory("There is no room for this adapter in accelerator memory now.")
    if result.error is ErrorCode.PIN_LIMIT:
        raise PinLimit(result.message, param="pin")
    if result.error is ErrorCode.NEVER_FITS:
        raise InvalidRequest(
            "This adapter is larger than all accelerator memory for adapters.",
            param="name",
            code="never_fits",
        )
    if result.error is ErrorCode.ADAPTER_DAMAGED:
        await asyncio.to_thread(face.require_registry().damage.recheck, version)
        raise DamagedAdapter("The stored files of this adapter are damaged; upload it again.")
    if result.error is not None:
        raise ChorusError("The engine could not load this adapter.", code=str(result.error))
    face.require_registry().loaded(version.digest, LastLoad(result.milliseconds))
    return result


async def _until_out(engine: EngineClient, digest: str) -> None:
    """The engine lets go when its last running sequence has; raises Conflict when that takes too long."""
    try:
        async with asyncio.timeout(_UNLOAD_WAIT_S):
            while engine.stats is not None and digest in engine.stats.resident:  # noqa: ASYNC110  # no event tells
                await asyncio.sleep(_UNLOAD_POLL_S)
    except TimeoutError:
        raise Conflict(
            "This adapter is in use; it leaves accelerator memory when its last request ends.", param="name"
        ) from None


# small things


def _view(face: Face, tenant: str, name: str) -> AdapterView:
    registry = face.require_registry()
    record = registry.get(name, tenant=tenant)
    return adapter_view(record, tenant, registry.base_parameters, Locations.of(face.engine.stats))


async def _json(request: Request, kind: type[Body]) -> Body:
    return _parse(await read_body(request, _MAX_JSON_BYTES), kind)


def _parse(raw: bytes, kind: type[Body]) -> Body:
    try:
        return kind.model_validate_json(raw)
    except pydantic.ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_context=False)) from None


def _as_compatible(error: ChorusError) -> ChorusError:
    """The same error in the words of the compatible routes, which answer 400 where ours say 409."""
    if isinstance(error, Conflict):
        error = InvalidRequest(error.message, param=error.param, code="already_loaded")
    error.param = {"name": "lora_name", "source": "lora_path"}.get(error.param or "", error.param)
    return error
