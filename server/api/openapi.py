"""`/openapi.json`: FastAPI's document, completed by what it cannot know.

The routes read their own bodies (bounded, beside the event loop) and encode their own answers, so FastAPI
sees neither. Both are described here, from the types that bodies are judged by and answers are made of.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import pydantic
from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from server.api.adapter_views import AdapterListView, AdapterView, DeletedView, LoadedView, PublishedView
from server.api.adapters import LoadBody, LoadLoraBody, SourceBody, UnloadLoraBody
from server.api.errors import ErrorBody
from server.api.replies import Chat, ChatChunk, Completion, Detokenized, Model, ModelList, Tokenized
from server.api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_REF = "#/components/schemas/"
_BINARY = {"type": "string", "format": "binary"}
_UPLOAD = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "description": {"type": "string"},
        "files": {
            "type": "array",
            "items": _BINARY,
            "description": "adapter_config.json and adapter_model.safetensors, or one .zip, .tar, .tar.gz or "
            ".tgz of them. Files are known by their file name; the name of their part is free.",
        },
    },
    "required": ["files"],
}


@dataclass(frozen=True)
class Operation:
    """What one method of one path takes and gives."""

    answers: Mapping[int, Any]  # status -> type of the JSON, or `str` for text
    body: type[pydantic.BaseModel] | None = None
    body_required: bool = True
    form: Mapping[str, Any] | None = None  # JSON schema of a multipart body
    chunk: Any = None  # type of the events of a stream


OPERATIONS = {
    ("/v1/completions", "post"): Operation({200: Completion}, CompletionRequest, chunk=Completion),
    ("/v1/chat/completions", "post"): Operation({200: Chat}, ChatRequest, chunk=ChatChunk),
    ("/v1/models", "get"): Operation({200: ModelList}),
    ("/v1/models/{model_id}", "get"): Operation({200: Model}),
    ("/tokenize", "post"): Operation({200: Tokenized}, TokenizeRequest),
    ("/detokenize", "post"): Operation({200: Detokenized}, DetokenizeRequest),
    ("/v1/adapters", "get"): Operation({200: AdapterListView}),
    ("/v1/adapters", "post"): Operation(
        {201: PublishedView}, SourceBody, form=_UPLOAD | {"required": ["name", "files"]}
    ),
    ("/v1/adapters/{name}", "get"): Operation({200: AdapterView}),
    ("/v1/adapters/{name}", "put"): Operation({200: PublishedView, 201: PublishedView}, form=_UPLOAD),
    ("/v1/adapters/{name}", "delete"): Operation({200: DeletedView, 202: DeletedView}),
    ("/v1/adapters/{name}/load", "post"): Operation({200: LoadedView}, LoadBody, body_required=False),
    ("/v1/adapters/{name}/unload", "post"): Operation({200: LoadedView}),
    ("/v1/load_lora_adapter", "post"): Operation({200: str}, LoadLoraBody),
    ("/v1/unload_lora_adapter", "post"): Operation({200: str}, UnloadLoraBody),
}


class DescribedApp(FastAPI):
    """A FastAPI app whose document has the bodies in it. Every path of OPERATIONS must be routed."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = _complete(super().openapi())
        return self.openapi_schema


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for path in document["paths"].values():
        for method in path.values():
            method["responses"].pop("422", None)  # FastAPI's own, which no route here answers
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for (path, method), operation in OPERATIONS.items():
        document["paths"][path][method] |= _described(operation)
    schemas |= _body_schemas(operation.body for operation in OPERATIONS.values() if operation.body)
    answers = [kind for operation in OPERATIONS.values() for kind in operation.answers.values()]
    chunks = [operation.chunk for operation in OPERATIONS.values() if operation.chunk]
    schemas |= _answer_schemas(kind for kind in (*answers, *chunks, ErrorBody) if kind is not str)
    return document


def _described(operation: Operation) -> dict[str, Any]:
    """`requestBody` and `responses` of an Operation Object (OpenAPI 3.1, 4.8.10)."""
    described: dict[str, Any] = {"responses": {"default": _content("An error.", ErrorBody)}}
    for status, kind in operation.answers.items():
        answer = _content("Done.", kind)
        if operation.chunk is not None:
            answer["description"] = "The whole answer, or with `stream` events of the parts, then `[DONE]`."
            answer["content"]["text/event-stream"] = {"schema": _ref(operation.chunk)}
        described["responses"][str(status)] = answer
    taken: dict[str, Any] = {}
    if operation.body is not None:
        taken["application/json"] = {"schema": _ref(operation.body)}
    if operation.form is not None:
        taken["multipart/form-data"] = {"schema": dict(operation.form)}
    if taken:
        described["requestBody"] = {"required": operation.body_required, "content": taken}
    return described


def _content(description: str, kind: Any) -> dict[str, Any]:
    media = {"text/plain": {"type": "string"}} if kind is str else {"application/json": _ref(kind)}
    return {
        "description": description,
        "content": {name: {"schema": schema} for name, schema in media.items()},
    }


def _ref(kind: Any) -> dict[str, str]:
    return {"$ref": _REF + kind.__name__}


def _body_schemas(kinds: Iterable[type[pydantic.BaseModel]]) -> dict[str, Any]:
    wanted = [(kind, "validation") for kind in kinds]
    _, found = models_json_schema(wanted, ref_template=_REF + "{model}")  # type: ignore[arg-type]  # a literal
    schemas: dict[str, Any] = found["$defs"]
    return schemas


def _answer_schemas(kinds: Iterable[Any]) -> dict[str, Any]:
    _, schemas = msgspec.json.schema_components(dict.fromkeys(kinds), ref_template=_REF + "{name}")
    for schema in schemas.values():
        if "description" in schema:
            schema["description"] = inspect.cleandoc(schema["description"])
    return schemas
