"""Quotas over HTTP: set, felt, told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import app
from tests.api.face_site import eventually, listen
from tests.api.test_tenants import OPERATOR, Tenants, open_tenants


@pytest.fixture
async def tenants(tmp_path: Path) -> AsyncIterator[Tenants]:
    async with open_tenants(tmp_path) as tenants:
        yield tenants


async def put(tenants: Tenants, path: str, **limits: Any) -> None:
    answer = await tenants.operator.ask("PUT", f"/v1/quotas/{path}", json=limits)
    assert answer.status_code == 200, answer.text


async def test_a_tenant_meets_its_quota_and_another_does_not(tenants: Tenants) -> None:
    first = await tenants.acme.complete("base")
    assert not [name for name in first.headers if name.startswith("x-ratelimit")]
    await put(tenants, "tenant/acme", requests_per_s=0.01, tokens_per_day=1000)
    taken = await tenants.acme.complete("base")
    assert taken.status_code == 200
    assert taken.headers["x-ratelimit-limit-requests"] == "1"
    assert taken.headers["x-ratelimit-remaining-requests"] == "0"
    assert 0 < int(taken.headers["x-ratelimit-remaining-tokens"]) < 1000
    refused = await tenants.acme.complete("base")
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"], error["type"]) == (
        429, "rate_limit_exceeded", "requests_per_s", "rate_limit_error",
    )  # fmt: skip
    assert 90 <= int(refused.headers["retry-after"]) <= 100
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert (await tenants.other.complete("base")).status_code == 200
    assert (await tenants.operator.ask("DELETE", "/v1/quotas/tenant/acme")).status_code == 200
    assert (await tenants.acme.complete("base")).status_code == 200


async def test_of_a_key_and_of_an_adapter(tenants: Tenants) -> None:
    keys = (await tenants.operator.ask("GET", "/v1/keys?tenant=acme")).json()["data"]
    await put(tenants, f"key/{keys[0]['id']}", tokens_per_day=1)
    await tenants.acme.complete("base")
    assert (await tenants.acme.complete("base")).json()["error"]["param"] == "tokens_per_day"
    await tenants.other.upload("mine")
    await put(tenants, "adapter/other:mine", tokens_per_s=0.001)
    assert (await tenants.other.complete("mine")).status_code == 200
    refused = await tenants.other.complete("mine")
    assert (refused.status_code, refused.json()["error"]["param"]) == (429, "tokens_per_s")
    assert (await tenants.other.complete("base")).status_code == 200
    assert tenants.site.face.waiting_room.waiting == 0


async def test_requests_for_tokens_alone_count_too(tenants: Tenants) -> None:
    await put(tenants, "tenant/acme", requests_per_s=0.001, tokens_per_s=100.0)
    first = await tenants.acme.ask("POST", "/tokenize", json={"prompt": "hello"})
    assert (first.status_code, first.headers["x-ratelimit-remaining-requests"]) == (200, "0")
    assert first.headers["x-ratelimit-remaining-tokens"] == "100"
    for path, body in (("/tokenize", {"prompt": "hello"}), ("/detokenize", {"tokens": [1]})):
        refused = await tenants.acme.ask("POST", path, json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (429, "requests_per_s")
        assert int(refused.headers["retry-after"]) > 1
    assert (await tenants.other.ask("POST", "/tokenize", json={"prompt": "hello"})).status_code == 200


async def test_concurrency_is_given_back_when_a_client_goes(tenants: Tenants) -> None:
    await put(tenants, "tenant/acme", concurrent_requests=1, weight=3.0)
    engine = tenants.site.engine
    engine.pause_after = 0
    running = asyncio.create_task(tenants.acme.complete("base"))
    await eventually(lambda: bool(engine.running))
    assert engine.requests[-1].weight == 3.0
    refused = await tenants.acme.complete("base")
    assert (refused.status_code, refused.json()["error"]["param"]) == (429, "concurrent_requests")
    engine.resume.set()
    assert (await running).status_code == 200
    assert (await tenants.acme.complete("base")).status_code == 200


async def test_what_a_tenant_stores(tenants: Tenants) -> None:
    await put(tenants, "tenant/acme", adapters_stored=1)
    assert (await tenants.acme.upload("a")).status_code == 201
    refused = await tenants.acme.upload("b", 1)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (409, "quota_exceeded", "adapters_stored")
    assert (await tenants.acme.ask("GET", "/v1/adapters")).json()["data"][0]["name"] == "a"
    assert (await tenants.acme.upload("a", 1, "PUT")).status_code == 200
    assert (await tenants.other.upload("b", 1)).status_code == 201
    await put(tenants, "tenant/acme", bytes_stored=1)
    assert (await tenants.acme.upload("a", 1, "PUT")).status_code == 200  # nothing new
    refused = await tenants.acme.upload("a", 2, "PUT")
    assert (refused.status_code, refused.json()["error"]["param"]) == (409, "bytes_stored")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("colour/x", {"weight": 1}, "kind"), ("tenant/A", {"weight": 1}, "name"),
        ("key/x", {"tokens_per_day": 1}, "name"), ("adapter/a b", {"tokens_per_day": 1}, "name"),
        ("tenant/a", {}, None), ("tenant/a", {"colour": 1}, "colour"),
        ("tenant/a", {"requests_per_s": 0}, "requests_per_s"), ("tenant/a", {"weight": 1e9}, "weight"),
        ("tenant/a", {"tokens_per_day": 1.5}, "tokens_per_day"), ("adapter/a", {"weight": 1}, "weight"),
    ],
)  # fmt: skip
async def test_what_cannot_be_set(
    tenants: Tenants, path: str, body: dict[str, Any], param: str | None
) -> None:
    answer = await tenants.operator.ask("PUT", f"/v1/quotas/{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert (await tenants.operator.ask("GET", "/v1/quotas")).json()["data"] == []


async def test_only_admins(tenants: Tenants) -> None:
    for method in ("PUT", "GET", "DELETE"):
        answer = await tenants.acme.ask(method, "/v1/quotas/tenant/acme", json={"weight": 1})
        assert answer.status_code == 403
    assert (await tenants.operator.ask("GET", "/v1/quotas/tenant/acme")).status_code == 404


async def test_the_commands_and_pages(tenants: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    async with listen(tenants.site.app) as url:

        async def run(*words: str) -> str:
            given = ["quotas", *words, "--server", url, "--api-key", OPERATOR]
            result = await asyncio.to_thread(CliRunner().invoke, app, given)
            assert result.exit_code == 0, result.output
            return result.stdout

        assert "weight = 2.0" in await run("set", "tenant", "acme", "--weight", "2")
        await run("set", "adapter", "acme:team/sql", "--tokens-per-day", "1000")
        listed = await run("list")
        assert "acme:team/sql" in listed
        page = (await tenants.operator.ask("GET", "/v1/quotas?limit=1")).json()
        assert (page["last_id"], page["has_more"]) == ("adapter/acme:team/sql", True)
        rest = (await tenants.operator.ask("GET", f"/v1/quotas?after={page['last_id']}")).json()
        assert [quota["id"] for quota in rest["data"]] == ["acme"]
        await run("remove", "adapter", "acme:team/sql")
        assert "team/sql" not in await run("list", "--json")
