"""Quotas over REST, for admins: set, show, remove."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from typing import Annotated, Literal, TypedDict

import pydantic
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.requests import Request
from starlette.responses import Response

from server.access.caller import check_tenant
from server.api.adapters.upload import in_thread
from server.api.body import read_body
from server.api.face import face_of
from server.api.inference.parsing import from_validation
from server.api.operation import Operation
from server.api.paging import Page
from server.errors import InvalidRequest, NotFound, Unavailable
from server.telemetry.audit import audit
from server.usage.quotas import QUOTA_KINDS, Quota, QuotaKind, Quotas, Subject

router = APIRouter(tags=["quotas"])

_MAX_JSON_BYTES = 64 * 2**10
_LISTED = 100
_MOST_LISTED = 1000
_OF_TENANTS = ("adapters_stored", "bytes_stored", "weight")
_KEY_ID = re.compile(r"[0-9a-f]{12}")
_LABEL = re.compile(r"(?:[a-z0-9][a-z0-9._-]{0,62}:)?[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")

Rate = Annotated[float, pydantic.Field(gt=0, le=1e9, allow_inf_nan=False)]
Most = Annotated[int, pydantic.Field(ge=0, le=2**53)]


class QuotaBody(pydantic.BaseModel):
    """The whole quota: what is not given is not limited."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    requests_per_s: Rate | None = None
    tokens_per_s: Rate | None = None
    tokens_per_day: Most | None = None
    concurrent_requests: Most | None = None
    adapters_stored: Most | None = None
    bytes_stored: Most | None = None
    weight: Annotated[float, pydantic.Field(ge=0.01, le=100)] | None = None


class QuotaView(TypedDict):
    object: Literal["quota"]
    kind: QuotaKind
    id: str
    requests_per_s: float | None
    tokens_per_s: float | None
    tokens_per_day: int | None
    concurrent_requests: int | None
    adapters_stored: int | None
    bytes_stored: int | None
    weight: float | None


class QuotaListView(TypedDict):
    object: Literal["list"]
    data: list[QuotaView]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.put("/v1/quotas/{kind}/{name:path}")
@Operation({200: QuotaView}, QuotaBody, scopes=("admin",))
async def put_quota(request: Request, kind: str, name: str) -> Response:
    """Limit a `tenant` (its name), a `key` (its id) or an `adapter` (its name as in usage), from now on."""
    subject, quotas = _subject(kind, name), _quotas(request)
    quota = _parse(await read_body(request, _MAX_JSON_BYTES), subject.kind)
    audit("quota.put", request, kind=kind, name=name, **_given(quota))
    await in_thread(lambda: quotas.put(subject, quota))
    return JSONResponse(_view(subject, quota))


@router.get("/v1/quotas")
@Operation({200: QuotaListView}, scopes=("admin",))
async def list_quotas(request: Request) -> Response:
    """All of them, by kind and id."""
    page, quotas = Page.of(request, default=_LISTED, most=_MOST_LISTED), _quotas(request)

    def encode() -> bytes:
        shown = ((f"{subject.kind}/{subject.id}", _view(subject, quota)) for subject, quota in quotas.known())
        later = [(each, view) for each, view in shown if each > page.after]
        return page.encode(sorted(later, key=lambda entry: entry[0])[: page.wanted])

    return Response(await asyncio.to_thread(encode), media_type="application/json")


@router.get("/v1/quotas/{kind}/{name:path}")
@Operation({200: QuotaView}, scopes=("admin",))
async def get_quota(request: Request, kind: str, name: str) -> Response:
    subject = _subject(kind, name)
    quota = _quotas(request).get(subject)
    if quota is None:
        raise NotFound(f"This {kind} has no quota.", param="name")
    return JSONResponse(_view(subject, quota))


@router.delete("/v1/quotas/{kind}/{name:path}")
@Operation({200: QuotaView}, scopes=("admin",))
async def remove_quota(request: Request, kind: str, name: str) -> Response:
    """It is not limited any more; answers what it was."""
    subject, quotas = _subject(kind, name), _quotas(request)
    audit("quota.remove", request, kind=kind, name=name)
    quota = await in_thread(lambda: quotas.remove(subject))
    return JSONResponse(_view(subject, quota))


def _subject(kind: str, name: str) -> Subject:
    """Raises InvalidRequest."""
    known = next((each for each in QUOTA_KINDS if each == kind), None)
    if known is None:
        raise InvalidRequest(f"kind: one of {', '.join(QUOTA_KINDS)}", param="kind")
    if known == "tenant":
        check_tenant(name, "name")
    if known == "key" and not _KEY_ID.fullmatch(name):
        raise InvalidRequest("name: the id of a key, 12 hex digits", param="name")
    if known == "adapter" and not _LABEL.fullmatch(name):
        raise InvalidRequest(
            "name: an adapter's name, with `tenant:` before it unless default's", param="name"
        )
    return Subject(known, name)


def _parse(raw: bytes, kind: QuotaKind) -> Quota:
    """Raises InvalidRequest."""
    try:
        quota = Quota(**QuotaBody.model_validate_json(raw).model_dump())
    except pydantic.ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_context=False)) from None
    given = _given(quota)
    if not given:
        raise InvalidRequest("The quota limits nothing; DELETE removes one.")
    if kind != "tenant" and (beyond := [name for name in _OF_TENANTS if name in given]):
        raise InvalidRequest(f"{beyond[0]}: for tenants alone", param=beyond[0])
    return quota


def _given(quota: Quota) -> dict[str, float]:
    return {name: value for name, value in dataclasses.asdict(quota).items() if value is not None}


def _view(subject: Subject, quota: Quota) -> dict[str, object]:
    return {"object": "quota", **subject._asdict(), **dataclasses.asdict(quota)}


def _quotas(request: Request) -> Quotas:
    """Raises Unavailable before the data folder is open."""
    quotas = face_of(request).quotas
    if quotas is None:
        raise Unavailable("The server is starting.", code="engine_not_ready")
    return quotas
