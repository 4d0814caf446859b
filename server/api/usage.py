"""Who has used what, by hour: JSON a page at a time, or CSV."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import io
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Literal, NotRequired, TypedDict

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from server.api.caller import caller_of
from server.api.face import Face, face_of
from server.api.operation import Operation
from server.api.paging import Page
from server.errors import InvalidRequest, Unavailable
from server.usage.ledger import UsageLedger
from server.usage.records import GROUPINGS, Amount, Grouping, UsageLine, UsageQuery

router = APIRouter(tags=["usage"])

_LISTED = 1000
_MOST_LISTED = 10_000
_CSV_LINES = 5000  # of one look into the database
_PARAMETERS = ("start", "end", "tenant", "key", "adapter", "group_by", "format", "limit", "after")


class UsageView(TypedDict):
    """One line: what it was added up by, of that which was asked for, and the sums."""

    object: Literal["usage"]
    id: str
    day: NotRequired[str]  # as 2026-11-28
    hour: NotRequired[str]  # its start, as 2026-11-28T13:00:00Z
    tenant: NotRequired[str]
    key: NotRequired[str]  # its id; empty: none of the registry
    adapter: NotRequired[str]
    version: NotRequired[str]  # digest; empty: the base model
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class UsageListView(TypedDict):
    object: Literal["list"]
    data: list[UsageView]
    first_id: str | None
    last_id: str | None
    has_more: bool


@router.get("/v1/usage")
@Operation({200: UsageListView}, scopes=("manage",))
async def get_usage(request: Request) -> Response:
    """Requests and tokens of `start` to `end`, of one tenant's own, or (admins) of all. CSV by `format=csv`
    or `Accept: text/csv`: all lines, with no pages."""
    face, query = face_of(request), _query(request)
    ledger = _ledger(face)
    if _wants_csv(request):
        await asyncio.to_thread(ledger.fold)
        headers = {"content-disposition": 'attachment; filename="usage.csv"'}
        return StreamingResponse(_csv(ledger, query), media_type="text/csv", headers=headers)
    page = Page.of(request, default=_LISTED, most=_MOST_LISTED)
    query = dataclasses.replace(query, after=_group_of(page.after, query), most=page.wanted)

    def encode() -> bytes:
        """In a thread: it may wait for the disk."""
        ledger.fold()
        lines = ledger.lines(query)
        return page.encode((_id_of(line), _view(line, query)) for line in lines)

    return Response(await asyncio.to_thread(encode), media_type="application/json")


async def _csv(ledger: UsageLedger, query: UsageQuery) -> AsyncIterator[bytes]:
    names = [name for name in GROUPINGS if name in query.group_by]
    query = dataclasses.replace(query, most=_CSV_LINES)
    text = ",".join((*names, *Amount._fields)) + "\r\n"
    while True:
        lines = await asyncio.to_thread(ledger.lines, query)
        yield text.encode() + _rows(lines, names)
        if len(lines) < _CSV_LINES or not names:
            return
        query, text = dataclasses.replace(query, after=lines[-1].group), ""


def _rows(lines: list[UsageLine], names: list[Grouping]) -> bytes:
    file = io.StringIO()
    csv.writer(file).writerows((*_shown(line, names).values(), *line.amount) for line in lines)
    return file.getvalue().encode()


def _shown(line: UsageLine, names: list[Grouping]) -> dict[str, str]:
    return {
        name: _iso(value)[: 10 if name == "day" else None] if isinstance(value, int) else value
        for name, value in zip(names, line.group, strict=True)
    }


def _view(line: UsageLine, query: UsageQuery) -> dict[str, object]:
    names = [name for name in GROUPINGS if name in query.group_by]
    group = _shown(line, names)
    return {"object": "usage", "id": _id_of(line), **group, **line.amount._asdict()}


def _query(request: Request) -> UsageQuery:
    """Raises InvalidRequest, and InsufficientScope for another tenant's."""
    given = request.query_params
    if unknown := set(given) - set(_PARAMETERS):
        name = sorted(unknown)[0][:40]
        raise InvalidRequest(f"{name}: no parameter of this route", param=name)
    caller, tenant = caller_of(request), given.get("tenant")
    acts_for_one = "x-chorus-tenant" in request.headers or not caller.may("admin")
    if tenant is not None:
        caller = caller.acting_for(tenant)
    own = caller.tenant if acts_for_one or tenant is not None else None
    adapter = given.get("adapter")
    labels = (adapter, *([f"{own}:{adapter}"] if own else [])) if adapter else ()
    return UsageQuery(
        start=_moment(given.get("start"), 0, "start"),
        end=_moment(given.get("end"), 2**62, "end"),
        tenant=own,
        key=given.get("key"),
        adapters=labels,
        group_by=_group_by(given.get("group_by")),
    )


def _group_by(text: str | None) -> tuple[Grouping, ...]:
    if text is None:
        return UsageQuery.group_by
    names = set(filter(None, text.split(",")))
    if not names <= set(GROUPINGS):
        raise InvalidRequest(f"group_by: some of {', '.join(GROUPINGS)}, with commas", param="group_by")
    return tuple(name for name in GROUPINGS if name in names)


def _moment(text: str | None, default: int, param: str) -> int:
    """Seconds since 1970, or a date or time of ISO 8601, in UTC unless it says otherwise."""
    if text is None:
        return default
    if text.isascii() and text.isdecimal() and len(text) <= 12:
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        raise InvalidRequest(
            f"{param}: seconds since 1970, or a time like 2026-11-28 or 2026-11-28T13:00:00Z", param=param
        ) from None


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _wants_csv(request: Request) -> bool:
    wanted = request.query_params.get("format")
    if wanted not in (None, "json", "csv"):
        raise InvalidRequest("format: json or csv", param="format")
    return wanted == "csv" or (wanted is None and "text/csv" in request.headers.get("accept", ""))


def _id_of(line: UsageLine) -> str:
    return urlsafe_b64encode(msgspec.json.encode(line.group)).decode()


def _group_of(line_id: str, query: UsageQuery) -> tuple[int | str, ...] | None:
    """Raises InvalidRequest for an id that no line of this query has."""
    if not line_id:
        return None
    kinds = [int if name in ("day", "hour") else str for name in GROUPINGS if name in query.group_by]
    try:
        group = msgspec.json.decode(urlsafe_b64decode(line_id), type=tuple[int | str, ...])
    except ValueError:
        group = ()
    if [type(value) for value in group] != kinds or any(
        isinstance(value, int) and abs(value) >= 2**62 for value in group
    ):
        raise InvalidRequest("after: the `last_id` of a page of the same query", param="after")
    return group


def _ledger(face: Face) -> UsageLedger:
    if face.usage is None:
        raise Unavailable("The server is starting.", code="engine_not_ready")
    return face.usage
