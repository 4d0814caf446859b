"""`/openapi.json`: sound as OpenAPI 3.1, complete, and true of what the routes take and give."""

from __future__ import annotations

import re
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.api import openapi
from server.api.adapters.views import AdapterListView, AdapterView, DeletedView, LoadedView, PublishedView
from server.api.app import ROUTERS
from server.api.inference.replies import Chat, Completion, Detokenized, ModelList, Tokenized
from server.api.inference.schemas import ChatRequest, CompletionRequest
from server.api.operation import operations
from tests.api.face_site import Site, open_site
from tests.registry import adapter_files

METHODS = {"get", "put", "post", "delete", "patch"}


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        site.say("yes")
        yield site


@pytest.fixture
async def document(site: Site) -> dict[str, Any]:
    response = await site.client.get("/openapi.json")
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


def documented(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        assert item.keys() <= METHODS
        for method, operation in item.items():
            yield path, method, operation


def refs(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for each in value.values():
            yield from refs(each)
    elif isinstance(value, list):
        for each in value:
            yield from refs(each)


def followed(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    name = schema["$ref"].removeprefix("#/components/schemas/")
    target: dict[str, Any] = document["components"]["schemas"][name]
    return target


def test_the_document_is_sound(document: dict[str, Any]) -> None:
    assert re.fullmatch(r"3\.1\.\d+", document["openapi"])
    assert {"title", "version"} <= document["info"].keys()
    names = document["components"]["schemas"].keys()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)
    wanted = {ref.removeprefix("#/components/schemas/") for ref in refs(document)}
    assert wanted == set(names)  # none is missing, none is left over
    ids = [operation["operationId"] for _, _, operation in documented(document)]
    assert len(ids) == len(set(ids))
    for path, _, operation in documented(document):
        assert path.startswith("/")
        named = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
        assert named == set(re.findall(r"{(\w+)}", path))
        assert operation["responses"]
        for status, response in operation["responses"].items():
            assert status == "default" or re.fullmatch(r"[1-5]\d\d", status)
            assert response["description"]
        if "requestBody" in operation:
            assert operation["requestBody"]["content"]


def test_every_route_says_what_it_takes_and_gives(document: dict[str, Any]) -> None:
    described = {(path, method.upper()) for path, method, _ in documented(document)}
    assert described == {(path, method) for path, method, _ in operations(*ROUTERS)}
    for path, method, operation in documented(document):
        takes_nothing = method in ("get", "delete") or path.endswith(("/unload", "/reload"))
        assert ("requestBody" in operation) != takes_nothing, path
        for response in operation["responses"].values():
            assert all(media["schema"] for media in response["content"].values()), path
        error = operation["responses"]["default"]["content"]["application/json"]["schema"]
        assert followed(document, error)["properties"].keys() == {"error"}
        assert "422" not in operation["responses"]


def test_generation_fields(document: dict[str, Any]) -> None:
    for path, kind, own in (
        ("/v1/completions", CompletionRequest, {"prompt", "echo"}),
        ("/v1/chat/completions", ChatRequest, {"messages", "max_completion_tokens"}),
    ):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        schema = followed(document, content["application/json"]["schema"])
        fields = schema["properties"].keys()
        assert {"model", "adapters", "max_tokens", "ignore_eos", "top_k", "stop", "stream"} | own <= fields
        assert kind.model_fields.keys() <= fields
        assert schema["additionalProperties"] is False
        assert {"user", "tools", "response_format"} <= fields
    prompt = document["components"]["schemas"]["CompletionRequest"]["properties"]["prompt"]
    assert [form["type"] for form in prompt["anyOf"]] == ["string", "array", "array", "array"]


async def test_uploads(document: dict[str, Any]) -> None:
    post = document["paths"]["/v1/adapters"]["post"]["requestBody"]["content"]
    assert post.keys() == {"application/json", "multipart/form-data"}
    assert post["multipart/form-data"]["schema"]["required"] == ["name", "files"]
    put = document["paths"]["/v1/adapters/{name}"]["put"]
    assert put["requestBody"]["content"]["multipart/form-data"]["schema"]["required"] == ["files"]
    assert {"200", "201"} <= put["responses"].keys()


async def test_answers_are_of_the_types_that_describe_them(site: Site) -> None:
    parts = [("files", (file, data)) for file, data in adapter_files.files(seed=9).items()]
    call = site.client.request
    for kind, response in (
        (Completion, await site.complete(logprobs=1, return_token_ids=True)),
        (Chat, await site.chat(model="sql", logprobs=True, top_logprobs=1)),
        (ModelList, await call("GET", "/v1/models")),
        (Tokenized, await call("POST", "/tokenize", json={"prompt": "hello", "return_token_strs": True})),
        (Detokenized, await call("POST", "/detokenize", json={"tokens": [5]})),
        (PublishedView, await call("PUT", "/v1/adapters/new", files=parts)),
        (LoadedView, await call("POST", "/v1/adapters/new/load")),
        (LoadedView, await call("POST", "/v1/adapters/new/unload")),
        (AdapterView, await call("GET", "/v1/adapters/new")),
        (AdapterListView, await call("GET", "/v1/adapters")),
        (DeletedView, await call("DELETE", "/v1/adapters/new")),
    ):
        assert response.is_success, response.text
        read = msgspec.json.decode(response.content, type=kind)  # raises where a field is missing or wrong
        assert msgspec.to_builtins(read).keys() >= response.json().keys()


async def test_it_is_made_beside_the_event_loop(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    make = openapi._complete

    def noted(*arguments: Any) -> dict[str, Any]:
        threads.append(threading.get_ident())
        return make(*arguments)

    monkeypatch.setattr(openapi, "_complete", noted)
    await site.app.describe()
    assert (await site.client.get("/openapi.json")).status_code == 200
    (thread,) = threads
    assert thread != threading.get_ident()
