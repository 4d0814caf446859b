"""`GET /v1/models`, `/tokenize`, `/detokenize`: what can be asked for, and how text becomes tokens."""

from __future__ import annotations

import asyncio
from itertools import chain

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.adapters.views import SHARED_SOURCE
from server.api.body import read_body
from server.api.caller import caller_of
from server.api.face import Face, face_of
from server.api.inference.limits import within_limits_of_requests
from server.api.inference.replies import Detokenized, Model, ModelList, Tokenized
from server.api.inference.schemas import DetokenizeRequest, TokenizeRequest
from server.api.operation import SEE_ADAPTERS, Operation
from server.api.paging import Page
from server.messages import EngineInfo
from server.registry.records import AdapterVersion

router = APIRouter()

# All at once: SDKs ask for one page only, and take it for the whole.
_MOST_LISTED = 10_000


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _base(face: Face, info: EngineInfo) -> Model:
    name = face.base.name
    return Model(name, face.created, "chorus", name, None, info.max_model_len)


def _adapter(face: Face, info: EngineInfo, version: AdapterVersion, tenant: str) -> Model:
    return Model(
        id=version.name,
        created=int(version.created_at),
        owned_by="chorus",
        root=version.source if version.tenant == tenant else SHARED_SOURCE,
        parent=face.base.name,
        max_model_len=info.max_model_len,
        adapter_version=version.digest,
    )


def _known(face: Face) -> EngineInfo:
    """What was said when the engine was ready first; still true while it restarts. Raises Unavailable."""
    return face.engine.info or face.require_engine()


@router.get("/v1/models")
@Operation({200: ModelList}, scopes=SEE_ADAPTERS)
async def list_models(request: Request) -> Response:
    """The base model, then the adapters that the caller can ask for, by name."""
    face, tenant = face_of(request), caller_of(request).tenant
    info, registry = _known(face), face.require_registry()
    page = Page.of(request, default=_MOST_LISTED, most=_MOST_LISTED)
    base = _base(face, info)

    def encode() -> bytes:
        """In a thread: there may be many thousands."""
        after = "" if page.after == base.id else page.after
        adapters = registry.current_versions(tenant=tenant, after=after, most=page.wanted)
        models = (_adapter(face, info, version, tenant) for version in adapters)
        return page.encode((model.id, model) for model in chain([] if page.after else [base], models))

    return Response(await asyncio.to_thread(encode), media_type="application/json")


@router.get("/v1/models/{model_id:path}")
@Operation({200: Model}, scopes=SEE_ADAPTERS)
async def retrieve_model(request: Request, model_id: str) -> Response:
    face, tenant = face_of(request), caller_of(request).tenant
    info = _known(face)
    if model_id == face.base.name:
        return _json(_base(face, info))
    with face.require_registry().acquire(model_id, tenant=tenant) as lease:
        model = _adapter(face, info, lease.version, tenant)
    return _json(msgspec.structs.replace(model, id=model_id))


@router.post("/tokenize")
@Operation({200: Tokenized}, TokenizeRequest, scopes=("infer",))
async def tokenize(request: Request) -> Response:
    face = face_of(request)
    info = _known(face)
    with within_limits_of_requests(request):
        body = await read_body(request, face.settings.max_request_bytes)
        return Response(await face.readers.tokenize(body, info), media_type="application/json")


@router.post("/detokenize")
@Operation({200: Detokenized}, DetokenizeRequest, scopes=("infer",))
async def detokenize(request: Request) -> Response:
    face = face_of(request)
    info = _known(face)
    with within_limits_of_requests(request):
        body = await read_body(request, face.settings.max_request_bytes)
        return Response(await face.readers.detokenize(body, info), media_type="application/json")
