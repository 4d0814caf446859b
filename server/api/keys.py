"""API keys over REST, for admins: make, list, revoke."""

from __future__ import annotations

import asyncio
import time
from typing import Literal, TypedDict

import pydantic
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from server.access.keyring import Keyring
from server.access.keys import KeyView, view
from server.api.adapters.upload import in_thread
from server.api.body import read_body
from server.api.caller import caller_of
from server.api.face import face_of
from server.api.inference.parsing import from_validation
from server.api.operation import Operation
from server.api.paging import Page
from server.errors import Unavailable
from server.telemetry.audit import audit

router = APIRouter(tags=["keys"])

_MAX_JSON_BYTES = 64 * 2**10
_LISTED = 100
_MOST_LISTED = 1000
_LONGEST_LIFE_S = 100 * 366 * 86400


class KeyBody(pydantic.BaseModel):
    """What a new key is for. `tenant`: the caller's own, or the one he acts for, where it is not given."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    name: str = ""
    tenant: str | None = None
    scopes: list[str] = pydantic.Field(default=["infer"], max_length=16)
    expires_in_s: float | None = pydantic.Field(None, gt=0, le=_LONGEST_LIFE_S, allow_inf_nan=False)


class NewKeyView(KeyView):
    """`key` is told this once and never again."""

    key: str


class KeyListView(TypedDict):
    object: Literal["list"]
    data: list[KeyView]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.post("/v1/keys", status_code=201)
@Operation({201: NewKeyView}, KeyBody, body_required=False, scopes=("admin",))
async def create_key(request: Request) -> Response:
    """Make a key. It is shown in this answer alone: the server keeps its SHA-256."""
    body = _parse(await read_body(request, _MAX_JSON_BYTES) or b"{}")
    keyring, tenant = _keyring(request), body.tenant or caller_of(request).tenant
    audit("key.create", request, name=body.name, key_tenant=tenant, scopes=body.scopes)
    key, text = await in_thread(
        lambda: keyring.create(body.name, body.scopes, tenant=tenant, lifetime_s=body.expires_in_s)
    )
    audit("key.create", request, id=key.id)
    headers = {"cache-control": "no-store"}
    return JSONResponse({**view(key, time.time()), "key": text}, 201, headers)


@router.get("/v1/keys")
@Operation({200: KeyListView}, scopes=("admin",))
async def list_keys(request: Request) -> Response:
    """All keys of all tenants, oldest first, revoked ones too; `?tenant=` those of one."""
    page = Page.of(request, default=_LISTED, most=_MOST_LISTED)
    keyring, tenant = _keyring(request), request.query_params.get("tenant")

    def encode() -> bytes:
        """In a thread: there may be many thousands."""
        keys = [key for key in keyring.known() if tenant is None or key.tenant == tenant]
        ids = [key.id for key in keys]
        start = ids.index(page.after) + 1 if page.after in ids else 0 if not page.after else len(ids)
        now = time.time()
        return page.encode((key.id, view(key, now)) for key in keys[start : start + page.wanted])

    return Response(await asyncio.to_thread(encode), media_type="application/json")


@router.delete("/v1/keys/{key_id}")
@Operation({200: KeyView}, scopes=("admin",))
async def revoke_key(request: Request, key_id: str) -> Response:
    """It is refused from now on; requests that run by it go on to their end. It stays in the list."""
    keyring = _keyring(request)
    audit("key.revoke", request, id=key_id)
    key = await in_thread(lambda: keyring.revoke(key_id))
    return JSONResponse(view(key, time.time()))


def _keyring(request: Request) -> Keyring:
    """Raises Unavailable before the data folder is open; the door does so before."""
    keyring = face_of(request).keyring
    if keyring is None:
        raise Unavailable("The server is starting.", code="engine_not_ready")
    return keyring


def _parse(raw: bytes) -> KeyBody:
    try:
        return KeyBody.model_validate_json(raw)
    except pydantic.ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_context=False)) from None
