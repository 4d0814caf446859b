"""Who asks: no way around the door, and two tenants that must not see each other."""

from __future__ import annotations

import asyncio
from typing import Any

from load_tests.drills.case import case, expect
from load_tests.drills.cases.adapters import scaled
from load_tests.drills.site import Site

OPERATOR = "--api-key", "the-operators-own-key"

_STRANGE_HEADERS = (
    "host: evil.example",
    "host: /health",
    "x-original-url: /health",
    "x-rewrite-url: /health",
    "x-forwarded-for: 127.0.0.1",
    "x-http-method-override: GET",
    "x-chorus-tenant: default",
    "authorization: Bearer",
    f"authorization: Basic {OPERATOR[1]}",
    "x-api-key: wrong",
    f"cookie: api_key={OPERATOR[1]}",
    "connection: upgrade\r\nupgrade: websocket",
    "connection: upgrade, http2-settings\r\nupgrade: h2c",
)


def _spellings(path: str) -> tuple[str, ...]:
    """The same place by other spellings."""
    quoted = "".join(f"%{ord(c):02x}" if c.isalpha() and i % 2 else c for i, c in enumerate(path))
    return (
        path, f"/{path}", f"{path}/", f"//{path}", f"/.{path}", f"/x/..{path}", f"/health/..{path}", quoted,
        f"/%2e%2e{path}", f"/health/%2e%2e{path}", f"/health%2f..{path}", f"/health/live/..;{path}",
        path.upper(), f"{path}?x=/health", f"{path};/health/live", f"{path}%00", f"/health/live{path}",
        f"http://evil.example{path}", f"/%2f{path}",
    )  # fmt: skip


async def _status(site: Site, line: str, *headers: str) -> int:
    """Of one request, sent as it is: clients would tidy it up."""
    reader, writer = await site.connect()
    writer.write(site.head(line, *headers, "connection: close") + b"\r\n")
    answer = await asyncio.wait_for(reader.readline(), 30)
    writer.close()
    return int(answer.split()[1])


@case(38, "a strange Host header, //v1/..., encoded paths", "authentication unchanged: 401", *OPERATOR)
async def around_the_door(site: Site) -> str:
    paths = (await site.http.get("/openapi.json")).json()["paths"]
    guarded = [path for path in paths if not path.startswith("/health")] + ["/docs", "/openapi.json", "/none"]
    tried: dict[int, int] = {}
    for path in guarded:
        asked = [[f"{method} {spelt}"] for spelt in _spellings(path) for method in ("GET", "POST")]
        asked += [[f"{method} {path}"] for method in ("HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")]
        asked += [[f"GET {path}", header] for header in _STRANGE_HEADERS]
        for each in asked:
            status = await _status(site, *each)
            tried[status] = tried.get(status, 0) + 1
            expect(status == 401, f"{each}: {status}")
    known = await _status(site, "GET /v1/models", f"authorization: Bearer {OPERATOR[1]}")
    expect(known == 200, f"with a key {known}")
    return f"{tried[401]} times 401; with a key 200"


async def _of_tenant(site: Site, name: str) -> Site:
    """With a key that the operator made for it."""
    made = await site.http.post("/v1/keys", json={"tenant": name, "scopes": ["infer", "upload", "manage"]})
    expect(made.status_code == 201, made.text[:200])
    return site.shown(made.json()["key"])


def _probes(name: str) -> list[tuple[str, str, dict[str, Any]]]:
    """What can be asked of a name without making it."""
    prompt = {"prompt": "hello", "max_tokens": 1}
    return [
        ("POST", "/v1/completions", {"json": {"model": name, **prompt}}),
        ("POST", "/v1/completions", {"json": {"model": name, "stream": True, **prompt}}),
        ("POST", "/v1/completions", {"json": {"adapters": [{"name": name}], **prompt}}),
        (
            "POST",
            "/v1/chat/completions",
            {"json": {"model": name, "messages": [{"role": "user", "content": "hi"}]}},
        ),
        ("GET", f"/v1/models/{name}", {}),
        ("GET", f"/v1/adapters/{name}", {}),
        ("DELETE", f"/v1/adapters/{name}", {}),
        ("POST", f"/v1/adapters/{name}/load", {"json": {"pin": True}}),
        ("POST", f"/v1/adapters/{name}/unload", {}),
        ("POST", "/v1/unload_lora_adapter", {"json": {"lora_name": name}}),
    ]


_LISTS = "/v1/models", "/v1/adapters", "/v1/usage"


@case(39, "key A asks for tenant B's adapter", "404, no hint that it exists", *OPERATOR)
async def anothers_adapter(site: Site) -> str:
    async with await _of_tenant(site, "acme") as owner, await _of_tenant(site, "other") as other:
        return await _hidden(owner, other)


async def _hidden(owner: Site, other: Site) -> str:
    secret, nothing = "acme-secret", "acme-absent"
    made = await owner.upload(secret, owner.adapter_files())
    expect(made.status_code == 201, made.text[:200])
    digest = made.json()["digest"]
    expect((await owner.complete(secret)).status_code == 200, "its own tenant gets no answer")
    for suffix in ("", "@1", f"@{digest[:8]}"):
        pairs = zip(_probes(secret + suffix), _probes(nothing + suffix), strict=True)
        for (method, path, options), (_, path_of_none, options_of_none) in pairs:
            there = await other.http.request(method, path, **options)
            absent = await other.http.request(method, path_of_none, **options_of_none)
            same = there.text.replace(secret, nothing) == absent.text
            expect(there.status_code == absent.status_code and same, f"{path}: {there.text} {absent.text}")
            expect(
                there.status_code in ((404,) if not suffix else (400, 404)), f"{path}: {there.status_code}"
            )
    lists = [await other.http.request("GET", path) for path in _LISTS]
    told = [path for path, answer in zip(_LISTS, lists, strict=True) if secret in answer.text]
    expect(not told, f"{told} name it")
    seen = f"{len(_probes(secret)) * 3} calls answered as for a name that never was; no list names it"
    expect((await owner.complete(secret)).status_code == 200, "its own tenant gets no answer afterwards")
    own = await other.upload(secret, scaled(owner.adapter_files(), -1.0))
    expect(own.status_code == 201, f"the same name for itself: {own.status_code} {own.text[:100]}")
    for tenant in (owner, other):
        await tenant.http.request("DELETE", f"/v1/adapters/{secret}")
    return f"{seen}; the name is free for others"


async def _cached(tenant: Site, prompt: list[int]) -> int:
    """How many of the prompt's tokens were there already."""
    usage = (await tenant.complete(prompt=prompt)).json()["usage"]
    cached: int = usage["prompt_tokens_details"]["cached_tokens"]
    return cached


@case(56, "another client's prompt", "cached_tokens tells it within a tenant only", *OPERATOR)
async def anothers_prompt(site: Site) -> str:
    prompt = list(range(100, 356))
    async with await _of_tenant(site, "first") as one, await _of_tenant(site, "second") as other:
        first, again = await _cached(one, prompt), await _cached(one, prompt)
        others, othersagain = await _cached(other, prompt), await _cached(other, prompt)
    seen = f"{first}, then {again}; of another tenant {others}, then {othersagain}"
    expect(first == others == 0 and again == othersagain > 0, seen)
    return f"cached tokens of {len(prompt)}: {seen}"
