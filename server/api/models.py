"""`GET /v1/models`, `/tokenize`, `/detokenize`: what can be asked for, and how text becomes tokens."""

from __future__ import annotations

import asyncio
from itertools import chain

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import read_body
from server.api.face import Face, face_of
from server.api.inference.replies import Detokenized, Model, ModelList, Tokenized, encode_list
from server.api.inference.schemas import DetokenizeRequest, TokenizeRequest
from server.api.operation import Operation
from server.messages import EngineInfo
from server.registry.records import AdapterVersion

router = APIRouter()


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _base(face: Face, info: EngineInfo) -> Model:
    name = face.base.name
    return Model(name, face.created, "chorus", name, None, info.max_model_len)


def _adapter(face: Face, info: EngineInfo, version: AdapterVersion) -> Model:
    return Model(
        id=version.name,
        created=int(version.created_at),
        owned_by="chorus",
        root=version.source,
        parent=face.base.name,
        max_model_len=info.max_model_len,
        adapter_version=version.digest,
    )


def _known(face: Face) -> EngineInfo:
    """What was said when the engine was ready first; still true while it restarts. Raises Unavailable."""
    return face.engine.info or face.require_engine()


@router.get("/v1/models")
@Operation({200: ModelList})
async def list_models(request: Request) -> Response:
    face = face_of(request)
    info, registry = _known(face), face.require_registry()

    def encode() -> bytes:
        """In a thread: there may be many thousands."""
        adapters = (_adapter(face, info, version) for version in registry.current_versions())
        return encode_list(chain([_base(face, info)], adapters))

    return Response(await asyncio.to_thread(encode), media_type="application/json")


@router.get("/v1/models/{model_id:path}")
@Operation({200: Model})
async def retrieve_model(request: Request, model_id: str) -> Response:
    face = face_of(request)
    info = _known(face)
    if model_id == face.base.name:
        return _json(_base(face, info))
    with face.require_registry().acquire(model_id) as lease:
        model = _adapter(face, info, lease.version)
    return _json(msgspec.structs.replace(model, id=model_id))


@router.post("/tokenize")
@Operation({200: Tokenized}, TokenizeRequest)
async def tokenize(request: Request) -> Response:
    face = face_of(request)
    info = _known(face)
    body = await read_body(request, face.settings.max_request_bytes)
    return Response(await face.readers.tokenize(body, info), media_type="application/json")


@router.post("/detokenize")
@Operation({200: Detokenized}, DetokenizeRequest)
async def detokenize(request: Request) -> Response:
    face = face_of(request)
    info = _known(face)
    body = await read_body(request, face.settings.max_request_bytes)
    return Response(await face.readers.detokenize(body, info), media_type="application/json")
