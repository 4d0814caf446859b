"""HEAD and OPTIONS, and what pages of named origins may do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.cors import AllowedOrigins
from server.base_model import StartError
from tests.api.face_site import Site, listen, open_site

BODY = {"model": "base", "prompt": "hello", "max_tokens": 1}
APP = "https://app.example"


@pytest.mark.parametrize("path", ["/health", "/health/live", "/metrics", "/v1/models", "/v1/adapters/sql"])
async def test_head_is_get_without_a_body(tmp_path: Path, path: str) -> None:
    """By a real server: h11 and httptools look at the method as well."""
    async with open_site(tmp_path) as site, listen(site.app) as url, httpx.AsyncClient(base_url=url) as http:
        got, head = await http.get(path), await http.head(path)
        assert (head.status_code, head.content) == (got.status_code, b"")
        assert head.headers["content-type"] == got.headers["content-type"]
        assert int(head.headers["content-length"]) > 0


async def test_head_of_what_is_not_to_be_got(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        assert (await site.client.head("/v1/completions")).status_code == 405
        assert (await site.client.head("/nowhere")).status_code == 404


async def test_options_name_the_methods(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        for path, allow in (
            ("/v1/completions", "OPTIONS, POST"),
            ("/v1/models", "GET, HEAD, OPTIONS"),
            ("/v1/adapters/sql", "DELETE, GET, HEAD, OPTIONS, PATCH, PUT"),
        ):
            answer = await site.client.options(path)
            assert (answer.status_code, answer.headers["allow"]) == (204, allow)
        assert (await site.client.options("/nowhere")).status_code == 404


async def test_they_ask_for_a_key_as_others_do(tmp_path: Path) -> None:
    async with open_site(tmp_path, api_key="secret") as site:
        for method in ("HEAD", "OPTIONS"):
            assert (await site.client.request(method, "/v1/models")).status_code == 401
            key = {"authorization": "Bearer secret"}
            assert (await site.client.request(method, "/v1/models", headers=key)).is_success


def preflight(origin: str) -> dict[str, str]:
    return {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }


async def preflighted(site: Site, origin: str) -> httpx.Response:
    return await site.client.options("/v1/chat/completions", headers=preflight(origin))


@pytest.mark.parametrize("given", [APP, f"{APP}/", "HTTPS://App.example,http://localhost:3000", "*"])
async def test_pages_of_named_origins_may_call(tmp_path: Path, given: str) -> None:
    """The browser asks without a key first."""
    async with open_site(tmp_path, api_key="secret", cors_origins=given) as site:
        asked = await preflighted(site, APP)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] in (APP, "*")
        assert "authorization" in asked.headers["access-control-allow-headers"].lower()
        headers = {"origin": APP, "sec-fetch-site": "cross-site", "authorization": "Bearer secret"}
        answer = await site.client.post("/v1/completions", json=BODY, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] in (APP, "*")
        assert "access-control-allow-credentials" not in answer.headers
        refused = await site.client.post("/v1/completions", json=BODY, headers={"origin": APP})
        assert refused.status_code == 401
        assert "access-control-allow-origin" in refused.headers  # the page can read why


@pytest.mark.parametrize("settings", [{}, {"cors_origins": "https://other.example"}])
async def test_pages_of_others_may_not(tmp_path: Path, settings: dict[str, Any]) -> None:
    async with open_site(tmp_path, **settings) as site:
        for origin in (APP, "null", "https://other.example.evil"):
            asked = await preflighted(site, origin)
            assert "access-control-allow-origin" not in asked.headers
            answer = await site.client.post("/v1/completions", json=BODY, headers={"origin": origin})
            assert answer.status_code == 403
            assert "access-control-allow-origin" not in answer.headers
        two = [("origin", "https://other.example"), ("origin", APP), ("content-type", "application/json")]
        answer = await site.client.post("/v1/completions", json=BODY, headers=two)
        assert answer.status_code == 403


@pytest.mark.parametrize("given", ["app.example", "https://app.example/path", "https://", "null"])
def test_what_is_no_origin(given: str) -> None:
    with pytest.raises(StartError, match="cors-origins"):
        AllowedOrigins.of([given])
