"""`/openapi.json`: FastAPI's document, completed by what it cannot know and each route's Operation says."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterable
from typing import Any

import msgspec
import pydantic
from fastapi import APIRouter, FastAPI
from pydantic.json_schema import models_json_schema

from server.api.errors import ErrorBody
from server.api.operation import Operation, operations

_REF = "#/components/schemas/"


class DescribedApp(FastAPI):
    """A FastAPI app of `routers`, whose document has the bodies and answers in it."""

    def __init__(self, *routers: APIRouter, **options: Any) -> None:
        super().__init__(**options)
        self._operations = list(operations(*routers))
        for router in routers:
            self.include_router(router)

    async def describe(self) -> None:
        """Make the document, beside the event loop: it takes a sixth of a second, once."""
        await asyncio.to_thread(self.openapi)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = _complete(super().openapi(), self._operations)
        return self.openapi_schema


def _complete(document: dict[str, Any], described: list[tuple[str, str, Operation]]) -> dict[str, Any]:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for path in document["paths"].values():
        for method in path.values():
            method["responses"].pop("422", None)  # FastAPI's own, which no route here answers
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path, method, operation in described:
        document["paths"][path][method.lower()] |= _described(operation)
    facts = [operation for _, _, operation in described]
    schemas |= _body_schemas(operation.body for operation in facts if operation.body)
    answers = [kind for operation in facts for kind in operation.answers.values()]
    chunks = [operation.chunk for operation in facts if operation.chunk]
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
    _, document = models_json_schema(wanted, ref_template=_REF + "{model}")  # type: ignore[arg-type]  # a literal
    schemas: dict[str, Any] = document["$defs"]
    return schemas


def _answer_schemas(kinds: Iterable[Any]) -> dict[str, Any]:
    _, schemas = msgspec.json.schema_components(dict.fromkeys(kinds), ref_template=_REF + "{name}")
    for schema in schemas.values():
        if "description" in schema:
            schema["description"] = inspect.cleandoc(schema["description"])
    return schemas
