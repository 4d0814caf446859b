"""What pages of other sites may not do through a browser."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from server.api.browser import HostNames
from server.config import Settings
from tests.api.face_site import Site, open_site
from tests.registry import adapter_files

BODY = b'{"model": "base", "prompt": "hello", "max_tokens": 1}'
DELETE = ("DELETE", "/v1/adapters/sql")
COMPLETE = ("POST", "/v1/completions")


def code_of(answer: httpx.Response) -> str:
    code: str = answer.json()["error"]["code"]
    return code


async def ask(site: Site, route: tuple[str, str], **headers: str) -> httpx.Response:
    method, path = route
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return await site.client.request(method, path, content=BODY if method == "POST" else b"", headers=names)


@pytest.mark.parametrize("route", [DELETE, COMPLETE, ("PUT", "/v1/adapters/sql"), ("PATCH", "/nowhere")])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "http://chorus:81"},
        {"origin": "http://chorus.evil.example"},
        {"origin": "null"},
        {"origin": "http://"},
        {"origin": "http://chorus@evil.example"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "Cross-Site", "origin": "http://chorus"},
    ],
)
async def test_a_page_of_another_site_changes_nothing(
    tmp_path: Path, route: tuple[str, str], headers: dict[str, str]
) -> None:
    async with open_site(tmp_path) as site:
        refused = await ask(site, route, **headers)
        assert (refused.status_code, code_of(refused)) == (403, "forbidden")
        assert not site.engine.requests
        assert (await site.client.get("/v1/adapters/sql", headers=headers)).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"origin": "http://chorus", "sec_fetch_site": "same-origin"}])
async def test_its_own_pages_and_programs_do(tmp_path: Path, headers: dict[str, str]) -> None:
    async with open_site(tmp_path) as site:
        assert (await ask(site, COMPLETE, **headers)).status_code == 200
        assert (await ask(site, DELETE, **headers)).status_code == 200


async def test_a_page_of_a_name_that_the_operator_gave(tmp_path: Path) -> None:
    """A proxy in front may ask for the server by another name than the browser did."""
    async with open_site(tmp_path, allowed_hosts="chorus,llm.example,b.example:8443") as site:
        for origin, status in {
            "https://llm.example": 200,
            "https://x.llm.example": 403,
            "https://llm.example:81": 403,
            "https://b.example:8443": 200,
        }.items():
            assert (await ask(site, COMPLETE, origin=origin)).status_code == status


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
async def test_bodies_that_a_page_may_send_unasked(tmp_path: Path, kind: str) -> None:
    async with open_site(tmp_path) as site:
        refused = await ask(site, COMPLETE, content_type=kind)
        assert (refused.status_code, code_of(refused)) == (415, "unsupported_media_type")
        assert refused.json()["error"]["param"] == "content-type"


async def test_json_has_parameters(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        assert (await ask(site, COMPLETE, content_type="Application/JSON; charset=utf-8")).status_code == 200


async def test_uploads_are_forms(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        files = [("files", (name, data)) for name, data in adapter_files.files(seed=9).items()]
        form = {"files": files, "data": {"name": "new"}}
        assert (await site.client.post("/v1/adapters", **form)).status_code == 201  # type: ignore[arg-type]
        plain = {"content-type": "text/plain"}
        assert (await site.client.post("/v1/adapters", content=b"x", headers=plain)).status_code == 415
        assert (await site.client.put("/v1/adapters/new", content=b"x", headers=plain)).status_code == 415


@pytest.mark.parametrize("path", ["/health/live", "/metrics", "/v1/models", "/nowhere", "/openapi.json"])
async def test_another_name_for_this_server_is_not_answered(tmp_path: Path, path: str) -> None:
    async with open_site(tmp_path) as site:
        refused = await site.client.get(path, headers={"host": "evil.example"})
        assert (refused.status_code, code_of(refused)) == (421, "wrong_host")
        assert refused.headers["x-request-id"]


@pytest.mark.parametrize(
    ("host", "allowed", "name", "known"),
    [
        ("127.0.0.1", "", "127.0.0.1", True),
        ("127.0.0.1", "", "127.8.8.8", True),
        ("127.0.0.1", "", "::1", True),
        ("127.0.0.1", "", "localhost", True),
        ("127.0.0.1", "", "a.localhost", True),
        ("127.0.0.1", "", "10.0.0.1", False),
        ("127.0.0.1", "", "localhost.evil.example", False),
        ("127.0.0.1", "", "", False),
        ("10.0.0.1", "", "10.0.0.1", True),
        ("10.0.0.1", "", "10.0.0.2", False),
        ("llm.internal", "", "llm.internal", True),
        ("0.0.0.0", "", "10.0.0.2", True),  # any address: no page can take one for its own name
        ("::", "", "fe80::1", True),
        ("0.0.0.0", "", "evil.example", False),
        ("0.0.0.0", "LLM.example,b.example:80", "llm.example", True),
        ("0.0.0.0", "llm.example,b.example:80", "b.example", True),
        ("0.0.0.0", ".example.com", "a.b.example.com", True),
        ("0.0.0.0", ".example.com", "evilexample.com", False),
        ("127.0.0.1", "*", "evil.example", True),
    ],
)
def test_names(host: str, allowed: str, name: str, known: bool) -> None:
    settings = Settings(model="m", host=host, allowed_hosts=allowed)  # type: ignore[arg-type]  # as a flag
    assert HostNames.of(settings).has(name) is known


async def test_any_host_does_not_mean_any_origin(tmp_path: Path) -> None:
    async with open_site(tmp_path, allowed_hosts="*") as site:
        assert (await ask(site, COMPLETE, host="a.example")).status_code == 200
        assert (await ask(site, COMPLETE, host="a.example", origin="http://evil.example")).status_code == 403
