"""The door: nothing but the probes answers without a key, whatever way it is asked for."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from server.access.caller import SCOPES
from server.access.keyring import Keyring
from server.api.app import ROUTERS
from server.api.operation import open_paths, operations
from server.registry.data_folder import DataFolder
from tests.api.face_site import Site, events, eventually, listen, open_site

KEY = "a-static-key-of-this-test"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW")
DOCUMENTS = ("/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc")
NAMES = {"kind": "tenant", "name": "sql", "model_id": "sql", "key_id": "0" * 12}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path, api_key=KEY) as site:
        site.say("yes")
        yield site


@pytest.fixture
async def url(site: Site) -> AsyncIterator[str]:
    async with listen(site.app) as url:
        yield url


async def key_of(site: Site, *scopes: str, **fields: object) -> str:
    body = {"scopes": scopes, **fields}
    made = await site.client.post("/v1/keys", json=body, headers=bearer(KEY))
    assert made.status_code == 201, made.text
    key: str = made.json()["key"]
    return key


PATHS = sorted({path.format(**NAMES) for path, _, _ in operations(*ROUTERS)} | {*DOCUMENTS, "/", "/nowhere"})


def tricks(path: str) -> list[str]:
    """The same place by other spellings, and some places that are none."""
    quoted = "".join(f"%{ord(c):02x}" if c.isalpha() and i % 2 else c for i, c in enumerate(path))
    return [
        path, f"/{path}", f"{path}/", f"//{path}", f"/.{path}", f"/x/..{path}", f"/health/..{path}",
        f"/%2e%2e{path}", f"/health/%2e%2e{path}", f"/health%2f..{path}", f"/health/live/..;{path}", quoted,
        path.upper(), f"{path}?x=/health", f"{path}#/health", f"{path};/health/live", f"{path}%00",
        f"/health/live{path}", path.replace("/", "\\"), f"/%2f{path}",
    ]  # fmt: skip


def test_only_the_probes_are_open() -> None:
    assert open_paths(*ROUTERS) == {"/health", "/health/live", "/health/ready"}


async def test_every_route_by_every_method_and_trick_asks_for_a_key(url: str) -> None:
    """Sent as they are, by hand: clients would tidy them up."""
    split = urlsplit(url)
    assert split.port
    lines = [
        (method, trick)
        for path, method in itertools.product(PATHS, METHODS)
        for trick in (tricks(path) if method in ("GET", "POST") else [path])
        if path not in open_paths(*ROUTERS)
    ]
    for method, target in lines:
        status = await asyncio.to_thread(answer, split.port, method, target)
        if method in ("TRACE", "CONNECT", "BREW") and status in (400, 405, 501):
            continue  # the server knows no such method
        assert status in (400, 401), (method, target, status)
        assert status == 401 or not target.isascii() or "#" in target or "\\" in target, (method, target)


def answer(port: int, method: str, target: str, *headers: str) -> int:
    """The status of one request, written to a socket as it is."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        lines = [f"{method} {target} HTTP/1.1", *(headers or ("Host: x",)), "Connection: close", "", ""]
        connection.sendall("\r\n".join(lines).encode())
        with connection.makefile("rb") as file:
            return int(file.readline().split()[1])


@pytest.mark.parametrize(
    "headers",
    [
        ("Host: evil.example",),
        ("Host: /health",),
        ("Host: 127.0.0.1", "X-Forwarded-For: 127.0.0.1", "X-Original-URL: /health"),
        ("Host: 127.0.0.1", "X-Rewrite-URL: /health"),
        ("Host: x", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
         "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
        ("Host: x", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"),
        ("Host: x", "X-HTTP-Method-Override: GET"),
        ("Host: x", "Authorization: Bearer"),
        ("Host: x", "Authorization: Basic YTpi"),
        ("Host: x", "Authorization: " + KEY),
        ("Host: x", "x-api-key: wrong"),
        ("Host: x", "x-chorus-tenant: default"),
        ("Host: x", f"Cookie: api_key={KEY}"),
    ],
)  # fmt: skip
async def test_no_header_opens_it(url: str, headers: tuple[str, ...]) -> None:
    port = urlsplit(url).port
    assert port
    for target in ("/v1/models", f"http://x/v1/models?api_key={KEY}", "http://127.0.0.1/health/../v1/models"):
        assert await asyncio.to_thread(answer, port, "GET", target, *headers) == 401


async def test_what_is_told_without_a_key_and_with_a_wrong_one(site: Site) -> None:
    none = await site.client.get("/v1/models")
    assert none.headers["www-authenticate"] == 'Bearer realm="chorus"'
    assert none.json()["error"] | {"message": ""} == {
        "message": "", "type": "authentication_error", "param": None, "code": "missing_api_key",
    }  # fmt: skip
    wrong = await site.client.get("/v1/models", headers=bearer("wrong"))
    assert wrong.status_code == 401
    assert wrong.headers["www-authenticate"] == 'Bearer realm="chorus", error="invalid_token"'
    assert wrong.json()["error"]["code"] == "invalid_api_key"
    assert wrong.headers["x-request-id"]


async def test_both_ways_to_give_a_key(site: Site) -> None:
    for headers in (bearer(KEY), {"x-api-key": KEY}, {"authorization": f"bearer  {KEY}"}):
        assert (await site.client.get("/v1/models", headers=headers)).status_code == 200
    both = {"authorization": "Basic YTpi", "x-api-key": KEY}
    assert (await site.client.get("/v1/models", headers=both)).status_code == 200
    both = bearer("wrong") | {"x-api-key": KEY}
    assert (await site.client.get("/v1/models", headers=both)).status_code == 401


async def test_probes_need_none(site: Site) -> None:
    for path in open_paths(*ROUTERS):
        assert (await site.client.get(path)).status_code == 200
        assert (await site.client.get(path, headers=bearer("wrong"))).status_code == 200


async def test_every_route_asks_for_its_scopes(site: Site) -> None:
    """With each key of a single scope: 403 where the route names others, else whatever the route says."""
    keys = {scope: await key_of(site, scope) for scope in SCOPES}
    for path, method, facts in operations(*ROUTERS):
        for scope, key in keys.items():
            path_asked = path.format(**NAMES | {"name": "nobody"})
            headers = bearer(key) | {"content-type": "application/json"}
            answered = await site.client.request(method, path_asked, headers=headers, content=b"!")
            allowed = facts.open or scope in facts.scopes or scope == "admin"
            assert (answered.status_code == 403) != allowed, (method, path, scope, answered.text)
            if not allowed:
                assert answered.json()["error"]["code"] == "insufficient_scope"
                assert f'scope="{" ".join(facts.scopes)}"' in answered.headers["www-authenticate"]


async def test_documents_and_what_is_not_there_need_any_key(site: Site) -> None:
    key = await key_of(site, "infer")
    for path in DOCUMENTS:
        assert (await site.client.get(path)).status_code == 401
        assert (await site.client.get(path, headers=bearer(key))).status_code == 200
    assert (await site.client.get("/nowhere", headers=bearer(key))).status_code == 404
    assert (await site.client.post("/v1/models", headers=bearer(key))).status_code == 405


async def test_a_revoked_key_is_refused_at_once_and_its_streams_go_on(site: Site) -> None:
    key = await key_of(site, "infer")
    site.engine.pause_after = 1
    headers = bearer(key)
    running = asyncio.create_task(
        site.client.post(
            "/v1/completions", json={"model": "sql", "prompt": "a", "stream": True}, headers=headers
        )
    )
    await eventually(lambda: site.engine.running)
    revoked = await site.client.delete(f"/v1/keys/{key.split('-')[1]}", headers=bearer(KEY))
    assert revoked.json()["state"] == "revoked"
    assert (await site.client.get("/v1/models", headers=headers)).status_code == 401
    site.engine.resume.set()
    answered = await running
    assert answered.status_code == 200
    assert events(answered.text)[-1]["choices"][0]["finish_reason"] == "stop"


async def test_the_body_of_a_refused_request_is_not_read(site: Site) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield bytes(1000)

    answered = await site.client.post("/v1/adapters", content=body(), headers=bearer("wrong"))
    assert answered.status_code == 401
    assert read == 0


async def test_guesses_fill_no_log_and_stop_nobody(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for at in range(200):
        assert (await site.client.get("/v1/models", headers=bearer(f"guess-{at}"))).status_code == 401
    lines = [record for record in caplog.records if record.name.startswith("server.")]
    assert len(lines) == 1
    assert lines[0].levelno == logging.WARNING
    assert "guess" not in lines[0].getMessage()
    assert (await site.client.get("/v1/models", headers=bearer(KEY))).status_code == 200


async def test_keys_are_in_no_log(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = await key_of(site, "infer")
    await site.client.get("/v1/models", headers=bearer(key))
    assert key.rpartition("-")[2] not in caplog.text
    assert KEY not in caplog.text
    assert KEY not in repr(site.face.settings)


async def test_a_websocket_is_not_let_in(site: Site) -> None:
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/health", "headers": [], "query_string": b"", "subprotocols": []}
    await site.app(scope, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_before_the_keys_are_read_nothing_is_open(site: Site) -> None:
    site.face.keyring = None
    assert (await site.client.get("/v1/models", headers=bearer(KEY))).status_code == 503
    assert (await site.client.get("/health/live")).status_code == 200


async def test_an_open_server_asks_for_nothing(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        site.say("yes")
        for headers in ({}, bearer("any"), {"x-api-key": "any"}):
            assert (await site.client.get("/v1/models", headers=headers)).status_code == 200
        first = await site.client.post("/v1/keys", json={"scopes": ["infer"]})
        assert (first.status_code, first.json()["error"]["param"]) == (400, "scopes")
        made = (await site.client.post("/v1/keys", json={"scopes": ["admin"]})).json()
        assert (await site.client.get("/v1/models")).status_code == 401  # from now on
        assert (await site.client.get("/v1/models", headers=bearer(made["key"]))).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com"])
async def test_others_may_reach_it_only_with_keys_or_when_told(tmp_path: Path, host: str) -> None:
    async with open_site(tmp_path / "none", host=host) as site:
        (reason,) = site.failures
        assert f"--host {host}" in reason
        assert "chorus keys create" in reason
        assert "--no-auth" in reason
        assert site.engine.starts == 0
        assert (await site.client.get("/v1/models")).status_code == 503
    for fields in ({"api_key": KEY}, {"auth": False}):
        async with open_site(tmp_path / "-".join(fields), host=host, **fields) as site:
            assert site.failures == []
            assert (await site.client.get("/v1/models")).status_code == (401 if "api_key" in fields else 200)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
async def test_this_machine_may_reach_it_without(tmp_path: Path, host: str) -> None:
    async with open_site(tmp_path, host=host) as site:
        assert site.failures == []


async def test_a_stored_key_opens_a_server_that_others_reach(tmp_path: Path) -> None:
    with closing(DataFolder(tmp_path / "data")) as folder:
        _, key = Keyring([], folder.keys).create("", ["admin"])
    async with open_site(tmp_path, host="0.0.0.0") as site:
        assert site.failures == []
        assert (await site.client.get("/v1/models")).status_code == 401
        assert (await site.client.get("/v1/models", headers=bearer(key))).status_code == 200


async def test_keys_over_rest(site: Site) -> None:
    admin = bearer(KEY)
    body = {"name": "for tests", "tenant": "acme", "scopes": ["upload", "infer"], "expires_in_s": 60}
    made = await site.client.post("/v1/keys", json=body, headers=admin)
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    shown = made.json()
    assert (shown["scopes"], shown["tenant"], shown["state"]) == (["infer", "upload"], "acme", "active")
    assert shown["expires_at"] - shown["created_at"] == pytest.approx(60)
    (listed,) = (await site.client.get("/v1/keys", headers=admin)).json()["data"]
    assert listed == {key: value for key, value in shown.items() if key != "key"}
    assert (await site.client.get("/v1/models", headers=bearer(shown["key"]))).status_code == 200
    (listed,) = (await site.client.get("/v1/keys?tenant=acme", headers=admin)).json()["data"]
    assert listed["last_used"] is not None
    assert (await site.client.get("/v1/keys?tenant=other", headers=admin)).json()["data"] == []
    for _ in range(2):
        gone = await site.client.delete(f"/v1/keys/{shown['id']}", headers=admin)
        assert (gone.status_code, gone.json()["state"]) == (200, "revoked")
    missing = await site.client.delete("/v1/keys/000000000000", headers=admin)
    assert missing.status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"scopes": ["root"]}, "scopes"),
        ({"scopes": []}, "scopes"),
        ({"scopes": "infer"}, "scopes"),
        ({"scopes": ["admin"], "tenant": "acme"}, "scopes"),
        ({"tenant": "A B"}, "tenant"),
        ({"expires_in_s": 0}, "expires_in_s"),
        ({"expires_in_s": 1e400}, "expires_in_s"),
        ({"name": "\x1b]0;x\x07"}, "name"),
        ({"name": "x" * 300}, "name"),
        ({"owner": "me"}, "owner"),
        ([], None),
    ],
)
async def test_keys_that_are_not_made(site: Site, body: object, param: str | None) -> None:
    content = json.dumps(body).encode()
    refused = await site.client.post("/v1/keys", content=content, headers=bearer(KEY))
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
    assert (await site.client.get("/v1/keys", headers=bearer(KEY))).json()["data"] == []


async def test_pages_of_keys(site: Site) -> None:
    ids = [(await key_of(site, "infer")).split("-")[1] for _ in range(5)]
    seen: list[str] = []
    after = ""
    while True:
        query = httpx.QueryParams(limit=2, after=after)
        page = (await site.client.get(f"/v1/keys?{query}", headers=bearer(KEY))).json()
        seen += [key["id"] for key in page["data"]]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert sorted(seen) == sorted(ids)
    assert len(seen) == 5
