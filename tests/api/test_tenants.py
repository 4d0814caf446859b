"""Tenants over HTTP: another's adapter is not there, whatever is asked of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from load_tests.fake_engine import empty_stats
from tests.api.face_site import Site, brought_back, open_site
from tests.registry import adapter_files

OPERATOR = "a-static-key-of-this-test"
SCOPES = ["infer", "upload", "manage"]
SECRET = "acme-secret"


class Tenant:
    """A client with a key of its own."""

    def __init__(self, site: Site, headers: dict[str, str]) -> None:
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(site.app), base_url="http://chorus", headers=headers
        )

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return await self.client.request(method, path, **options)

    async def upload(self, name: str, seed: int = 0, method: str = "POST") -> httpx.Response:
        parts = [("files", (file, data)) for file, data in adapter_files.files(seed=seed).items()]
        if method == "PUT":
            return await self.ask("PUT", f"/v1/adapters/{name}", files=parts)
        return await self.ask("POST", "/v1/adapters", data={"name": name}, files=parts)

    async def complete(self, model: str) -> httpx.Response:
        return await self.ask("POST", "/v1/completions", json={"model": model, "prompt": "hello"})


class Tenants:
    def __init__(self, site: Site, operator: Tenant, acme: Tenant, other: Tenant) -> None:
        self.site = site
        self.operator = operator
        self.acme = acme
        self.other = other


@asynccontextmanager
async def open_tenants(root: Path) -> AsyncIterator[Tenants]:
    async with open_site(root, api_key=OPERATOR) as site:
        site.say("yes")
        operator = Tenant(site, {"x-api-key": OPERATOR})
        keys = [
            (await operator.ask("POST", "/v1/keys", json={"tenant": name, "scopes": SCOPES})).json()["key"]
            for name in ("acme", "other")
        ]
        acme, other = [Tenant(site, {"x-api-key": key}) for key in keys]
        yield Tenants(site, operator, acme, other)


@pytest.fixture
async def tenants(tmp_path: Path) -> AsyncIterator[Tenants]:
    async with open_tenants(tmp_path) as tenants:
        yield tenants


def probes(name: str, digest: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Everything that can be asked of a name. None of it makes it."""
    asked: list[tuple[str, str, dict[str, Any]]] = []
    for wanted in (name, f"{name}@1", f"{name}@{digest}", f"{name}@{digest[:8]}"):
        prompt = {"prompt": "hello"}
        chat = {"messages": [{"role": "user", "content": "hello"}]}
        asked += [
            ("POST", "/v1/completions", {"json": {"model": wanted, **prompt}}),
            ("POST", "/v1/completions", {"json": {"model": wanted, "stream": True, **prompt}}),
            ("POST", "/v1/completions", {"json": {"adapter": wanted, **prompt}}),
            ("POST", "/v1/completions", {"json": {"adapters": [{"name": wanted}], **prompt}}),
            ("POST", "/v1/chat/completions", {"json": {"model": wanted, **chat}}),
            ("GET", f"/v1/models/{wanted}", {}),
            ("GET", f"/v1/adapters/{wanted}", {}),
            ("DELETE", f"/v1/adapters/{wanted}", {}),
            ("POST", f"/v1/adapters/{wanted}/load", {}),
            ("POST", f"/v1/adapters/{wanted}/load", {"json": {"pin": True}}),
            ("POST", f"/v1/adapters/{wanted}/unload", {}),
            ("POST", "/v1/unload_lora_adapter", {"json": {"lora_name": wanted}}),
        ]
    return asked


def shown(answered: httpx.Response, name: str, *digests: str) -> tuple[int, dict[str, str], str]:
    """An answer without what differs from request to request, and with the names as one."""
    text = answered.text
    for digest in digests:
        text = text.replace(digest, "DIGEST").replace(digest[:8], "DIGEST")
    headers = {key: value for key, value in answered.headers.items() if key != "x-request-id"}
    return answered.status_code, headers, text.replace(name, "NAME")


async def test_anothers_adapter_answers_as_one_that_never_was(tenants: Tenants) -> None:
    """Letter for letter, headers too; while it serves, while it is loaded and pinned, while it is written."""
    created = (await tenants.acme.upload(SECRET, 1)).json()
    await tenants.acme.ask("POST", f"/v1/adapters/{SECRET}/load", json={"pin": True})
    await tenants.acme.complete(SECRET)
    nothing = "nobody-here"[: len(SECRET)]
    assert len(nothing) == len(SECRET)
    for (method, path, options), (_, same_path, same_options) in zip(
        probes(SECRET, created["digest"]), probes(nothing, created["digest"]), strict=True
    ):
        theirs = await tenants.other.ask(method, path, **options)
        unknown = await tenants.other.ask(method, same_path, **same_options)
        no_name = theirs.status_code == 400 and "@" in str((path, options))  # to delete a version, whosever
        assert theirs.status_code == 404 or no_name, (method, path, options)
        assert shown(theirs, SECRET, created["digest"]) == shown(unknown, nothing, created["digest"])
    assert (await tenants.acme.complete(SECRET)).status_code == 200


async def test_lists_are_each_tenants_own(tenants: Tenants) -> None:
    await tenants.acme.upload(SECRET, 1)
    for path in ("/v1/adapters", "/v1/models"):
        assert SECRET in (await tenants.acme.ask("GET", path)).text
        for stranger in (tenants.other, tenants.operator):
            listed = (await stranger.ask("GET", path)).json()
            assert SECRET not in json.dumps(listed)
    models = [model["id"] for model in (await tenants.other.ask("GET", "/v1/models")).json()["data"]]
    assert models == ["base"]  # nor what the operator has, until it is shared


async def test_the_same_name_twice_and_no_conflict(tenants: Tenants) -> None:
    answers = [await who.upload("mine", seed) for seed, who in enumerate((tenants.acme, tenants.other))]
    assert [answer.status_code for answer in answers] == [201, 201]
    digests = [answer.json()["digest"] for answer in answers]
    for who, digest in zip((tenants.acme, tenants.other), digests, strict=True):
        assert (await who.complete("mine")).json()["adapter_version"] == digest
    assert (await tenants.other.ask("DELETE", "/v1/adapters/mine")).status_code == 200
    assert (await tenants.acme.complete("mine")).status_code == 200


async def test_equal_content_tells_nothing(tenants: Tenants) -> None:
    """One has it in memory, has loaded and used it: to the other it is as new."""
    first = (await tenants.acme.upload("a", 1)).json()
    await tenants.acme.ask("POST", "/v1/adapters/a/load")
    await tenants.acme.complete("a")
    held = (first["digest"],)
    tenants.site.engine.stats = msgspec.structs.replace(empty_stats(), resident=held, on_host=held)
    second = await tenants.other.upload("a", 1)
    assert second.status_code == 201
    assert second.json()["digest"] != first["digest"]
    view = (await tenants.other.ask("GET", "/v1/adapters/a")).json()
    assert (view["residency"], view["last_load_ms"], view["requests"], view["last_used"]) == (
        "disk", None, 0, None,
    )  # fmt: skip
    assert (await tenants.acme.ask("GET", "/v1/adapters/a")).json()["residency"] == "arena"
    await tenants.other.complete("a")
    refs = [request.adapters[0].digest for request in tenants.site.engine.requests]
    assert len(set(refs)) == 2  # to the engine too: nothing that it keeps by digest is common


async def test_shared_adapters(tenants: Tenants) -> None:
    created = (await tenants.operator.upload("common", 1)).json()
    refused = await tenants.acme.ask("PATCH", "/v1/adapters/common", json={"shared": True})
    assert refused.status_code == 403
    assert (await tenants.acme.complete("common")).status_code == 404
    shared = await tenants.operator.ask("PATCH", "/v1/adapters/common", json={"shared": True})
    assert shared.json()["shared"] is True
    used = await tenants.acme.complete("common")
    assert used.json()["adapter_version"] == created["digest"]
    view = (await tenants.acme.ask("GET", "/v1/adapters/common")).json()
    figures = {"requests", "tokens", "last_used", "residency", "last_load_ms", "last_load_error"}
    hidden = {"tenant", "pinned"} | figures
    assert not hidden & (view.keys() | view["versions"][0].keys())
    assert view["source"] == view["versions"][0]["source"] == "shared"
    assert hidden <= (await tenants.operator.ask("GET", "/v1/adapters/common")).json().keys()
    (_, model) = (await tenants.acme.ask("GET", "/v1/models")).json()["data"]
    assert (model["id"], model["root"]) == ("common", "shared")
    for method, path in (
        ("DELETE", "/v1/adapters/common"),
        ("POST", "/v1/adapters/common/load"),
        ("POST", "/v1/adapters/common/unload"),
    ):
        assert (await tenants.acme.ask(method, path)).status_code == 403
    assert (await tenants.acme.upload("common", 2)).status_code == 201  # a name of its own, which comes first
    assert (await tenants.acme.complete("common")).json()["adapter_version"] != created["digest"]
    assert (await tenants.other.complete("common")).json()["adapter_version"] == created["digest"]
    await tenants.operator.ask("PATCH", "/v1/adapters/common", json={"shared": False})
    assert (await tenants.other.complete("common")).status_code == 404
    for body in ({}, {"shared": "yes"}, {"shared": True, "tenant": "acme"}):
        bad = await tenants.operator.ask("PATCH", "/v1/adapters/common", json=body)
        assert bad.status_code == 400


async def test_an_admin_acts_for_a_tenant(tenants: Tenants) -> None:
    await tenants.acme.upload(SECRET, 1)
    for_acme = {"x-chorus-tenant": "acme"}
    assert (await tenants.operator.ask("GET", f"/v1/adapters/{SECRET}")).status_code == 404
    assert (await tenants.operator.ask("GET", f"/v1/adapters/{SECRET}", headers=for_acme)).status_code == 200
    assert (await tenants.other.ask("GET", f"/v1/adapters/{SECRET}", headers=for_acme)).status_code == 403
    assert (await tenants.acme.ask("GET", f"/v1/adapters/{SECRET}", headers=for_acme)).status_code == 200
    bad = await tenants.operator.ask("GET", "/v1/adapters", headers={"x-chorus-tenant": "A B"})
    assert bad.json()["error"]["param"] == "x-chorus-tenant"
    made = await tenants.operator.ask("POST", "/v1/keys", json={}, headers=for_acme)
    assert made.json()["tenant"] == "acme"


async def test_tenants_read_nothing_that_lies_on_the_server(tenants: Tenants, tmp_path: Path) -> None:
    """The operator's folders would be theirs to copy, and to search by the errors."""
    source = str(tmp_path / "adapters" / "sql")
    for path in (source, "/nowhere"):
        refused = await tenants.acme.ask("POST", "/v1/adapters", json={"name": "x", "source": path})
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "source")
        body = {"lora_name": "x", "lora_path": path}
        refused = await tenants.acme.ask("POST", "/v1/load_lora_adapter", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "lora_path")
    taken = await tenants.operator.ask("POST", "/v1/adapters", json={"name": "x", "source": source})
    assert taken.status_code == 201


async def test_the_operators_figures_tell_tenants_apart(tenants: Tenants) -> None:
    created = [(await who.upload("a", 1)).json()["digest"] for who in (tenants.operator, tenants.acme)]
    await tenants.operator.complete("a")
    await tenants.acme.complete("a")
    tenants.site.engine.stats = msgspec.structs.replace(empty_stats(), resident=tuple(created))
    assert (await tenants.acme.ask("GET", "/metrics")).status_code == 403
    text = (await tenants.operator.ask("GET", "/metrics")).text
    assert 'running_lora_adapters="a,acme:a"' in text


async def test_pins_of_tenants_follow_and_come_back(tenants: Tenants) -> None:
    await tenants.acme.upload("a", 1)
    await tenants.acme.ask("POST", "/v1/adapters/a/load", json={"pin": True})
    second = (await tenants.acme.upload("a", 2, method="PUT")).json()["digest"]
    async with asyncio.timeout(20):
        while tenants.site.engine.pinned[-1] != second:  # noqa: ASYNC110  # a background task does it
            await asyncio.sleep(0.005)
    registry = tenants.site.face.require_registry()
    assert [(version.tenant, version.digest) for version in registry.pinned()] == [("acme", second)]


async def test_what_a_tenant_had_in_memory_comes_back(tenants: Tenants) -> None:
    digest = (await tenants.acme.upload("a", 1)).json()["digest"]
    tenants.site.engine.accepts_calls = True
    assert await brought_back(tenants.site, (digest,)) == [digest]


async def test_pages(tenants: Tenants) -> None:
    for name in ("b", "c", "a"):
        await tenants.acme.upload(name)
    page = (await tenants.acme.ask("GET", "/v1/adapters?limit=2")).json()
    assert [each["name"] for each in page["data"]] == ["a", "b"]
    assert (page["first_id"], page["last_id"], page["has_more"]) == ("a", "b", True)
    page = (await tenants.acme.ask("GET", "/v1/adapters?limit=2&after=b")).json()
    assert ([each["name"] for each in page["data"]], page["has_more"]) == (["c"], False)
    page = (await tenants.acme.ask("GET", "/v1/adapters?after=zzz")).json()
    assert page == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}

    page = (await tenants.acme.ask("GET", "/v1/models?limit=2")).json()
    assert [each["id"] for each in page["data"]] == ["base", "a"]
    page = (await tenants.acme.ask("GET", "/v1/models?limit=1&after=base")).json()
    assert ([each["id"] for each in page["data"]], page["has_more"]) == (["a"], True)
    page = (await tenants.acme.ask("GET", "/v1/models?after=a")).json()
    assert [each["id"] for each in page["data"]] == ["b", "c"]
    assert len((await tenants.acme.ask("GET", "/v1/models")).json()["data"]) == 4


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1001", "10001", "1e3", "٣", "9" * 5000])
async def test_limits_of_pages(tenants: Tenants, limit: str) -> None:
    paths = ["/v1/adapters"] + ["/v1/models"] * (limit != "1001")
    for path in paths:
        refused = await tenants.acme.ask("GET", path, params={"limit": limit})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "limit")
