"""Adapters over HTTP, on a real registry."""

from __future__ import annotations

import asyncio
import errno
import json
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from load_tests.drills.archives import tarred, zipped
from server.messages import ErrorCode
from server.registry.store import Sink
from server.turns import _AT_ONCE
from tests.api.adapter_app import Site
from tests.api.file_changes import changes_here
from tests.registry import adapter_files
from tests.registry.adapter_files import files, staged


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
async def site(data_dir: Path) -> AsyncIterator[Site]:
    async with Site.open(data_dir) as site:
        yield site


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert "/tmp" not in error["message"]
    return error


async def test_upload_and_inspect(site: Site) -> None:
    response = await site.upload("team/sql")
    assert response.status_code == 201
    created = response.json()
    assert (created["name"], created["version"], created["rank"], created["alpha"]) == ("team/sql", 1, 4, 8.0)
    shown = (await site.client.get("/v1/adapters/team/sql")).json()
    assert shown["digest"] == created["digest"]
    assert shown["state"] == "ready"
    assert shown["targets"] == ["q_proj", "v_proj"]
    assert shown["share"] == shown["parameters"] / adapter_files.BASE_PARAMETERS
    assert (shown["residency"], shown["last_load_ms"], shown["requests"], shown["last_used"]) == (
        "disk", None, 0, None,
    )  # fmt: skip
    assert [v["version"] for v in shown["versions"]] == [1]
    listed = (await site.client.get("/v1/adapters")).json()
    assert listed == {
        "object": "list",
        "data": [shown],
        "first_id": "team/sql",
        "last_id": "team/sql",
        "has_more": False,
    }
    site.assert_clean(created["digest"])


@pytest.mark.parametrize(
    ("file", "data"),
    [
        ("a.zip", zipped(files())),
        ("a.tar", tarred(files(), "w")),
        ("a.tar.gz", tarred(files())),
        ("A.TGZ", tarred(files())),
    ],
)
async def test_upload_of_an_archive(site: Site, file: str, data: bytes) -> None:
    plain = (await site.upload("plain")).json()
    response = await site.client.post(
        "/v1/adapters", data={"name": "a", "description": "from a file"}, files={"anything": (file, data)}
    )
    assert response.status_code == 201, response.text
    assert response.json()["digest"] == plain["digest"]  # however it came, the content is the same
    assert (await site.client.get("/v1/adapters/a")).json()["description"] == "from a file"
    site.assert_clean(plain["digest"])


async def test_the_name_may_come_last(site: Site) -> None:
    parts = [("f", (name, data)) for name, data in files().items()] + [("name", (None, "a"))]
    assert (await site.client.post("/v1/adapters", files=parts)).status_code == 201


async def test_replace(site: Site) -> None:
    created = await site.upload("a", files(seed=1), method="PUT")
    assert created.status_code == 201
    lease = site.registry.acquire("a")
    replaced = await site.upload("a", files(seed=2), method="PUT")
    assert (replaced.status_code, replaced.json()["version"]) == (200, 2)
    same = await site.upload("a", files(seed=2), method="PUT")
    assert (same.status_code, same.json()) == (200, replaced.json())
    assert lease.version.digest == created.json()["digest"]
    assert site.registry.acquire("a").version.digest == replaced.json()["digest"]
    shown = (await site.client.get("/v1/adapters/a")).json()
    assert [v["version"] for v in shown["versions"]] == [1, 2]
    site.assert_clean(created.json()["digest"], replaced.json()["digest"])


async def test_old_versions_are_forgotten_by_the_engine(site: Site) -> None:
    first = (await site.upload("a", files(seed=0))).json()["digest"]
    for seed in range(1, 6):
        await site.upload("a", files(seed=seed), method="PUT")
    await until(lambda: site.engine.forgotten == [first])


async def test_unknown_adapters(site: Site) -> None:
    for method, path in (
        ("GET", "/v1/adapters/x"),
        ("DELETE", "/v1/adapters/x"),
        ("POST", "/v1/adapters/x/load"),
        ("POST", "/v1/adapters/x/unload"),
    ):
        assert error_of(await site.client.request(method, path), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v1/adapters/a", "DELETE, GET, PATCH, PUT"),
        ("DELETE", "/v1/adapters", "GET, POST"),
        (
            "OPTIONS",
            "/v1/adapters/a/load",
            "DELETE, GET, PATCH, POST, PUT",
        ),  # `a/load` may be an adapter's name too
        ("GET", "/v1/load_lora_adapter", "POST"),
        ("POST", "/openapi.json", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_told_all_right_ones(
    site: Site, method: str, path: str, allowed: str
) -> None:
    response = await site.client.request(method, path)
    error = error_of(response, 405)
    assert (error["type"], error["code"]) == ("invalid_request_error", None)
    assert response.headers["allow"] == allowed


async def test_names(site: Site) -> None:
    for name in ("../x", "a\0b", "x" * 10_000, "a//b", ""):
        assert error_of(await site.upload(name), 400)["param"] == "name"
    assert error_of(await site.upload("base-model"), 400)["param"] == "name"
    parts = [("f", (name, data)) for name, data in files().items()]
    assert error_of(await site.client.post("/v1/adapters", files=parts), 400)["param"] == "name"
    other = await site.client.put("/v1/adapters/a", data={"name": "b"}, files=parts)
    assert error_of(other, 400)["param"] == "name"
    same = await site.client.put("/v1/adapters/a", data={"name": "a"}, files=parts)
    assert same.status_code == 201
    site.assert_clean(same.json()["digest"])


async def test_post_of_a_known_name(site: Site) -> None:
    digest = (await site.upload("a", files(seed=1))).json()["digest"]
    error = error_of(await site.upload("a", files(seed=2)), 409)
    assert (error["param"], error["code"]) == ("name", "conflict")
    site.assert_clean(digest)


async def test_fifty_uploads_of_one_name(site: Site) -> None:
    responses = await asyncio.gather(*(site.upload("a") for _ in range(50)))
    assert sorted(r.status_code for r in responses) == [201] + [409] * 49
    site.assert_clean(site.registry.acquire("a").version.digest)


NAN = {"adapter_model.safetensors": adapter_files.weights(spoil=float("nan"))}
WIDE = {"adapter_config.json": adapter_files.config(rank=8)}


@pytest.mark.parametrize(
    ("content", "status", "param"),
    [
        (files() | NAN, 400, "lora_B.weight"),
        (files() | WIDE, 400, "lora_A.weight"),
        (files() | {"adapter_config.json": adapter_files.config(use_dora=True)}, 400, "use_dora"),
        (files() | {"adapter_config.json": b"{" * 100_000}, 400, "adapter_config.json"),
        (files() | {"adapter_config.json": b" " * 2**21}, 413, "adapter_config.json"),
        (files() | {"adapter_model.safetensors": b"\xff" * 100}, 400, "adapter_model.safetensors"),
        ({"adapter_config.json": adapter_files.config()}, 400, "adapter_model.safetensors"),
        ({"adapter_model.safetensors": adapter_files.weights()}, 400, "adapter_config.json"),
        ({"adapter_config.json": adapter_files.config(), "adapter_model.bin": b"x"}, 415, "files"),
        ({"README.md": b"x"}, 400, "files"),
        (files() | {"a.zip": zipped(files())}, 400, None),
        ({"a.zip": zipped(files() | {"../x": b""})}, 400, "file"),
        ({"a.zip": b"not a zip"}, 400, "file"),
        ({"a.zip": zipped(files() | {"adapter_model.safetensors": bytes(3 * 2**20)})}, 413, "file"),
        ({"a.tar": tarred({"adapter_config.json": b"{}", "adapter_model.pt": b"x"})}, 415, "model.pt"),
    ],
)  # fmt: skip
async def test_what_is_refused_leaves_nothing(
    data_dir: Path, content: dict[str, bytes], status: int, param: str | None
) -> None:
    async with Site.open(data_dir, max_unpacked_bytes=2 * 2**20) as site:
        error = error_of(await site.upload("a", content), status)
        assert (error["param"] or "").endswith(param or "")
        assert (await site.client.get("/v1/adapters")).json()["data"] == []
        site.assert_clean()
        assert (await site.upload("a")).status_code == 201


async def test_uploads_over_the_limit(data_dir: Path) -> None:
    async with Site.open(data_dir, max_upload_bytes=2500) as site:
        assert error_of(await site.upload("a"), 413)["code"] == "too_large"
        request = site.client.build_request(
            "POST", "/v1/adapters", data={"name": "a"}, files={"f": ("a.zip", bytes(10_000))}
        )
        body = request.read()

        async def unannounced() -> AsyncIterator[bytes]:
            yield body[:2000]
            yield body[2000:]

        headers = {"content-type": request.headers["content-type"]}
        response = await site.client.post("/v1/adapters", content=unannounced(), headers=headers)
        assert error_of(response, 413)["code"] == "too_large"
        site.assert_clean()


FORM = "multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("", b"x"),
        ("text/plain", b"x"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=" + "b" * 300, b"x"),
        (FORM, b""),
        (FORM, b"no boundary"),
        (FORM, b"--b\r\n\r\nx\r\n--b--\r\n"),
        (FORM, b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\na'),
        (
            FORM,
            b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\na\r\n--b--',
        ),
        (FORM, b"--b\r\n" + b"H" * 10_000 + b": x\r\n\r\n"),
        (FORM, b"--b\r\n" + b"H: x\r\n" * 100 + b"\r\n"),
        (
            FORM,
            b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n\xff\r\n--b--\r\n',
        ),
        ("application/json", b"{"),
        ("application/json", b"[" * 100_000),
        ("application/json", b"{}"),
        ("application/json", b'{"name": "a", "source": "file:x", "sauce": 1}'),
    ],
)
async def test_malformed_bodies(site: Site, content_type: str, body: bytes) -> None:
    response = await site.client.post("/v1/adapters", content=body, headers={"content-type": content_type})
    assert response.status_code in (400, 413), response.text
    site.assert_clean()
    assert (await site.client.get("/v1/adapters")).json()["data"] == []


async def test_a_full_disk(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = (await site.upload("a", files(seed=1))).json()["digest"]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on /tmp/device")

    with monkeypatch.context() as patch:
        patch.setattr(Sink, "write", full)
        assert error_of(await site.upload("b"), 507)["code"] == "insufficient_storage"
        assert error_of(await site.upload("a", {"a.zip": zipped(files())}, method="PUT"), 507)
    site.assert_clean(digest)
    assert site.registry.acquire("a").version.digest == digest
    assert (await site.upload("b", files(seed=2))).status_code == 201


async def test_a_client_that_dies_in_mid_upload(site: Site) -> None:
    request = site.client.build_request(
        "POST", "/v1/adapters", data={"name": "a"}, files={"f": ("a.zip", bytes(2 * 2**20))}
    )
    body = request.read()
    staged: list[str] = []
    messages = [{"type": "http.request", "body": body[:-100], "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        staged.extend(adapter_files.staged(site.data_dir))
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        """Nobody reads it."""

    scope = {
        "type": "http", "method": "POST", "path": "/v1/adapters", "query_string": b"", "app": site.app,
        "headers": [(key.lower(), value) for key, value in request.headers.raw], "http_version": "1.1",
    }  # fmt: skip
    await site.app(scope, receive, send)
    assert staged
    site.assert_clean()
    assert (await site.client.get("/v1/adapters")).json()["data"] == []
    assert (await site.upload("a")).status_code == 201


NAMED = b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\na\r\n--b\r\n'


async def stalled() -> AsyncIterator[bytes]:
    yield NAMED
    await asyncio.Event().wait()


async def dribbling() -> AsyncIterator[bytes]:
    yield NAMED + b'Content-Disposition: form-data; name="f"; filename="a.zip"\r\n\r\n'
    while True:
        await asyncio.sleep(0.001)
        yield b"x"


@pytest.mark.parametrize("body", [stalled, dribbling])
async def test_an_upload_that_takes_too_long_is_given_up(
    data_dir: Path, body: Callable[[], AsyncIterator[bytes]]
) -> None:
    """Its least rate is the connection's matter: `test_connection.py`."""
    async with Site.open(data_dir, upload_timeout_s=0.1) as site:
        response = await site.client.post("/v1/adapters", content=body(), headers={"content-type": FORM})
        assert error_of(response, 408)["code"] == "too_slow"
        site.assert_clean()
        assert (await site.upload("a")).status_code == 201


async def test_a_dribbling_upload_keeps_nobody_from_its_name(site: Site) -> None:
    await site.upload("a", files(seed=1))
    slow = asyncio.create_task(
        site.client.put("/v1/adapters/a", content=dribbling(), headers={"content-type": FORM})
    )
    await until(lambda: bool(staged(site.data_dir)))
    assert (await site.upload("a", files(seed=2), method="PUT")).status_code == 200
    assert (await site.client.delete("/v1/adapters/a")).status_code == 200
    assert (await site.upload("a", files(seed=3))).status_code == 201
    slow.cancel()
    with suppress(asyncio.CancelledError):
        await slow
    assert staged(site.data_dir) == []


async def test_fifty_uploads_of_one_name_at_once(site: Site) -> None:
    await site.upload("a")
    uploads = [site.upload("a", files(seed=n), method="PUT") for n in range(1, 51)]
    codes = Counter([response.status_code for response in await asyncio.gather(*uploads)])
    assert codes.keys() <= {200, 409}
    assert codes[200] == site.registry.get("a").current.number - 1


async def test_a_large_upload_takes_little_memory(site: Site) -> None:
    zeros = zipped(files() | {"adapter_model.safetensors": bytes(64 * 2**20)}, zipfile.ZIP_STORED)
    head = b'--b\r\nContent-Disposition: form-data; name="f"; filename="a.zip"\r\n\r\n'

    async def body() -> AsyncIterator[bytes]:
        yield head
        for start in range(0, len(zeros), 2**16):
            yield zeros[start : start + 2**16]
        yield b"\r\n--b--\r\n"

    tracemalloc.start()
    response = await site.client.put("/v1/adapters/a", content=body(), headers={"content-type": FORM})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error_of(response, 400)["param"] == "adapter_model.safetensors"
    assert peak < 12 * 2**20
    site.assert_clean()


async def test_an_upload_that_is_cancelled(site: Site) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\na\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="f"; filename="a.zip"\r\n\r\n'
        while True:
            yield bytes(100_000)
            await asyncio.sleep(0)

    headers = {"content-type": "multipart/form-data; boundary=b"}
    upload = asyncio.create_task(site.client.post("/v1/adapters", content=endless(), headers=headers))
    await until(lambda: bool(staged(site.data_dir)))
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    site.assert_clean()
    assert list(site.registry.records()) == []


# deleting


async def test_delete(site: Site) -> None:
    digest = (await site.upload("a")).json()["digest"]
    response = await site.client.delete("/v1/adapters/a")
    assert (response.status_code, response.json()["state"]) == (200, "deleted")
    assert site.engine.forgotten == [digest]
    assert (await site.client.get("/v1/adapters/a")).status_code == 404
    site.assert_clean()


async def test_delete_while_in_use(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.adapters.routes._DELETE_WAIT_S", 0.01)
    digest = (await site.upload("a", files(seed=1))).json()["digest"]
    lease = site.registry.acquire("a")
    response = await site.client.delete("/v1/adapters/a")
    assert (response.status_code, response.json()["state"]) == (202, "draining")
    assert (await site.client.get("/v1/adapters/a")).json()["state"] == "draining"
    assert (await site.client.delete("/v1/adapters/a")).status_code == 404
    assert site.engine.forgotten == []
    other = await site.upload("a", files(seed=2))  # the name is free again
    assert other.status_code == 201
    site.assert_clean(digest, other.json()["digest"])
    lease.release()
    await until(lambda: site.engine.forgotten == [digest])
    site.assert_clean(other.json()["digest"])
    assert (await site.client.get("/v1/adapters/a")).json()["state"] == "ready"


async def test_the_engine_keeps_what_another_name_uses(site: Site) -> None:
    await site.upload("a")
    await site.upload("b")
    assert (await site.client.delete("/v1/adapters/a")).status_code == 200
    assert site.engine.forgotten == []
    assert (await site.client.delete("/v1/adapters/b")).status_code == 200
    assert len(site.engine.forgotten) == 1


# accelerator memory


async def test_load_and_unload(site: Site) -> None:
    digest = (await site.upload("a")).json()["digest"]
    loaded = (await site.client.post("/v1/adapters/a/load")).json()
    assert (loaded["residency"], loaded["milliseconds"], loaded["digest"]) == ("arena", 1.5, digest)
    shown = (await site.client.get("/v1/adapters/a")).json()
    assert (shown["residency"], shown["last_load_ms"]) == ("arena", 1.5)
    unloaded = await site.client.post("/v1/adapters/a/unload")
    assert (unloaded.status_code, unloaded.json()["residency"]) == (200, "host")
    shown = (await site.client.get("/v1/adapters/a")).json()
    assert (shown["residency"], shown["last_load_ms"]) == ("host", 1.5)


async def residency(site: Site, name: str) -> list[str]:
    """As both routes show it, for the name and for its one version."""
    shown = (await site.client.get(f"/v1/adapters/{name}")).json()
    listed = (await site.client.get("/v1/adapters")).json()["data"]
    assert [view for view in listed if view["name"] == name] == [shown]
    return [shown["residency"], *(version["residency"] for version in shown["versions"])]


async def test_residency_is_where_the_engine_says_it_is(site: Site) -> None:
    """Whoever moved it: a request brings an adapter in and pushes others out without any call."""
    digest = (await site.upload("a")).json()["digest"]
    assert await residency(site, "a") == ["disk", "disk"]
    site.engine.on_host.add(digest)
    assert await residency(site, "a") == ["host", "host"]
    site.engine.resident[digest] = False
    assert await residency(site, "a") == ["arena", "arena"]
    site.engine.resident.clear()
    assert await residency(site, "a") == ["host", "host"]
    site.engine.on_host.clear()
    assert await residency(site, "a") == ["disk", "disk"]


async def test_residency_dies_with_the_engine(site: Site) -> None:
    await site.upload("a")
    await site.client.post("/v1/adapters/a/load")
    await site.upload("b", files(seed=1))
    await site.client.post("/v1/adapters/b/load")
    await site.client.post("/v1/adapters/b/unload")
    assert await residency(site, "a") == ["arena", "arena"]
    assert await residency(site, "b") == ["host", "host"]
    site.engine.restart()
    assert await residency(site, "a") == await residency(site, "b") == ["disk", "disk"]
    assert (await site.client.get("/v1/adapters/a")).json()["last_load_ms"] == 1.5


async def test_load_of_an_old_version(site: Site) -> None:
    first = (await site.upload("a", files(seed=1))).json()["digest"]
    await site.upload("a", files(seed=2), method="PUT")
    await site.client.post("/v1/adapters/a@1/load")
    assert list(site.engine.resident) == [first]


async def test_only_a_name_can_be_pinned(site: Site) -> None:
    await site.upload("a")
    response = await site.client.post("/v1/adapters/a@1/load", json={"pin": True})
    assert error_of(response, 400)["param"] == "pin"
    assert site.engine.resident == {}


async def test_unload_while_in_use(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = (await site.upload("a")).json()["digest"]
    await site.client.post("/v1/adapters/a/load")
    site.engine.in_use.add(digest)
    monkeypatch.setattr("server.api.adapters.routes._UNLOAD_WAIT_S", 0.01)
    assert error_of(await site.client.post("/v1/adapters/a/unload"), 409)["param"] == "name"
    monkeypatch.setattr("server.api.adapters.routes._UNLOAD_WAIT_S", 30.0)
    unload = asyncio.create_task(site.client.post("/v1/adapters/a/unload"))
    await asyncio.sleep(0.01)
    site.engine.in_use.clear()
    site.engine.resident.clear()
    assert (await unload).status_code == 200


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (ErrorCode.OUT_OF_MEMORY, 503),
        (ErrorCode.NEVER_FITS, 400),
        (ErrorCode.ADAPTER_LOAD_FAILED, 500),
    ],
)
async def test_loads_that_the_engine_refuses(site: Site, refusal: ErrorCode, status: int) -> None:
    await site.upload("a")
    site.engine.refusal = refusal
    response = await site.client.post("/v1/adapters/a/load", json={"pin": True})
    assert error_of(response, status)["code"] == str(refusal)
    assert ("retry-after" in response.headers) == (status == 503)
    shown = (await site.client.get("/v1/adapters/a")).json()
    assert (shown["state"], shown["residency"], shown["pinned"]) == ("ready", "disk", False)


async def test_pins_beyond_their_share_are_refused(site: Site) -> None:
    site.engine.most_pinned = 1
    for name in "ab":
        await site.upload(name, files(seed=ord(name)))
    assert (await site.client.post("/v1/adapters/a/load", json={"pin": True})).status_code == 200
    error = error_of(await site.client.post("/v1/adapters/b/load", json={"pin": True}), 409)
    assert (error["code"], error["param"]) == ("pin_limit", "pin")
    assert [version.name for version in site.registry.pinned()] == ["a"]


@pytest.mark.parametrize("most_pinned", [1, 1000])
async def test_a_pin_follows_the_name_to_its_new_version(site: Site, most_pinned: int) -> None:
    """Also where there is no room for both versions among the pins."""
    site.engine.most_pinned = most_pinned
    first = (await site.upload("a", files(seed=1))).json()["digest"]
    await site.client.post("/v1/adapters/a/load", json={"pin": True})
    assert site.engine.resident == {first: True}
    second = (await site.upload("a", files(seed=2), method="PUT")).json()["digest"]
    await until(lambda: site.engine.resident == {second: True})
    assert [v.digest for v in site.registry.pinned()] == [second]
    await site.client.post("/v1/adapters/a/unload")
    assert site.registry.pinned() == []


async def test_before_the_registry_is_open(site: Site) -> None:
    site.face.registry = None
    response = await site.client.get("/v1/adapters")
    assert error_of(response, 503)
    assert "retry-after" in response.headers


# folders of this machine


async def test_register_a_folder(data_dir: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    folder = adapter_files.write(root / "a b")
    async with Site.open(data_dir, allowed_lora_roots=(root,)) as site:
        for name, source in (("a", f"file:{folder}"), ("b", folder.as_uri())):
            response = await site.client.post("/v1/adapters", json={"name": name, "source": source})
            assert response.status_code == 201, response.text
        again = await site.client.post("/v1/adapters", json={"name": "a", "source": str(folder)})
        assert error_of(again, 409)
        for source, status in (
            ("hf://org/repo", 400),
            ("s3://bucket/x", 400),
            ("http://169.254.169.254/latest", 403),
            ("https://example.com/x", 403),
            ("", 400),
            ("file:", 400),
            ("file:\0", 400),
            (f"file:{root}/../elsewhere", 403),
            (f"file:{root}/missing", 404),
            ("/" + "x" * 10_000, 403),
        ):
            response = await site.client.post("/v1/adapters", json={"name": "c", "source": source})
            assert error_of(response, status)["param"] == "source", source
        site.assert_clean(site.registry.acquire("a").version.digest)


async def test_register_an_archive(data_dir: Path, tmp_path: Path) -> None:
    """Refusals name the field of the route, and a wrong archive leaves nothing."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.tgz").write_bytes(tarred(files()))
    (root / "bad.zip").write_bytes(b"no archive")
    async with Site.open(data_dir, allowed_lora_roots=(root,)) as site:
        response = await site.client.post("/v1/adapters", json={"name": "a", "source": f"file:{root}/a.tgz"})
        assert response.status_code == 201, response.text
        assert response.json()["source"] == f"file:{root}/a.tgz"
        assert (await load_lora(site, "b", root / "a.tgz")).status_code == 200
        assert error_of(await load_lora(site, "c", root / "bad.zip"), 400)["param"] == "lora_path"
        site.assert_clean(response.json()["digest"])


async def load_lora(site: Site, name: str, path: Path | str, **more: object) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path), "lora_int_id": 7, **more}
    return await site.client.post("/v1/load_lora_adapter", json=body)


async def test_the_compatible_routes(data_dir: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    folder = adapter_files.write(root / "a", files(seed=1))
    async with Site.open(data_dir, adapters=root) as site:
        response = await load_lora(site, "x", folder)
        assert (response.status_code, response.headers["content-type"]) == (200, "text/plain; charset=utf-8")
        assert "x" in response.text
        error = error_of(await load_lora(site, "x", folder), 400)
        assert (error["param"], error["code"]) == ("lora_name", "already_loaded")
        adapter_files.write(folder, files(seed=2))
        assert (await load_lora(site, "x", folder, load_inplace=True)).status_code == 200
        assert [v.number for v in site.registry.current_versions()] == [2]
        unload = await site.client.post("/v1/unload_lora_adapter", json={"lora_name": "x", "lora_int_id": 7})
        assert unload.status_code == 200
        unload = await site.client.post("/v1/unload_lora_adapter", json={"lora_name": "x"})
        assert error_of(unload, 404)["param"] == "lora_name"
        await until(lambda: adapter_files.on_disk(data_dir) == set())


async def test_lora_paths(data_dir: Path, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", adapter_files.write(tmp_path / "outside")
    adapter_files.write(root / "bad", files() | NAN)
    (root / "link").symlink_to(outside)
    (root / "files").mkdir()
    for name in files():
        (root / "files" / name).symlink_to(outside / name)
    (root / "inner").symlink_to(adapter_files.write(root / "real"))
    (root / "empty").mkdir()
    (root / "loop").symlink_to(root / "loop")
    adapter_files.write(root / "pickle", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    async with Site.open(data_dir, allowed_lora_roots=(root,)) as site:
        for path, status in (
            (outside, 403),
            (tmp_path / "missing", 403),
            (root / "link", 403),
            (root / "files", 403),
            (root / ".." / "outside", 403),
            (root / "missing", 404),
            (root / "real" / "adapter_config.json", 404),
            (root / "empty", 400),
            (root / "bad", 400),
            (root / "pickle", 415),
            (root / "loop", 403),
        ):
            assert error_of(await load_lora(site, "x", path), status), path
        assert error_of(await load_lora(site, "../x", root / "real"), 400)["param"] == "lora_name"
        assert (await site.client.post("/v1/load_lora_adapter", json={})).status_code == 400
        site.assert_clean()
        assert (await load_lora(site, "x", root / "inner")).status_code == 200


async def test_fifty_loads_of_one_name(data_dir: Path, tmp_path: Path) -> None:
    folder = adapter_files.write(tmp_path / "root" / "a")
    async with Site.open(data_dir, adapters=tmp_path / "root") as site:
        responses = await asyncio.gather(*(load_lora(site, "x", folder) for _ in range(50)))
        assert sorted(r.status_code for r in responses) == [200] + [400] * 49
        site.assert_clean(site.registry.acquire("x").version.digest)


async def test_answers_are_json_without_paths(site: Site, tmp_path: Path) -> None:
    await site.upload("a")
    text = json.dumps((await site.client.get("/v1/adapters")).json())
    assert str(tmp_path) not in text


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # what is awaited happens in threads and background tasks
            await asyncio.sleep(0.005)


async def test_uploads_at_once_are_taken_in_by_turns(site: Site) -> None:
    """A piece is copied more than once: fifty in one turn of the loop hold it for tens of milliseconds."""
    turn, taken = 0, Counter[int]()

    def next_turn() -> None:
        nonlocal turn
        turn += 1
        asyncio.get_running_loop().call_soon(next_turn)

    form = httpx.Request("POST", "http://x", files=[("files", each) for each in files().items()])
    whole = form.read()
    pieces = [whole[at : at + 1000] for at in range(0, len(whole), 1000)]

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            taken[turn] += 1
            yield piece

    next_turn()
    headers = {"content-type": form.headers["content-type"]}
    uploads = [site.client.put(f"/v1/adapters/a{k}", content=body(), headers=headers) for k in range(50)]
    answers = await asyncio.gather(*uploads)
    assert {answer.status_code for answer in answers} == {201}
    assert sum(taken.values()) == 50 * len(pieces)
    assert max(taken.values()) <= 2 * _AT_ONCE  # those that begin, and those that go on


async def test_the_event_loop_changes_nothing_on_the_disk(site: Site) -> None:
    """Even to make or rename a folder waits, some 50 ms, while others' uploads are synced."""
    with changes_here() as changes:
        assert (await site.upload("sql")).status_code == 201
        assert (await site.upload("sql", files(seed=1), method="PUT")).status_code == 200
        assert (await site.upload("sql")).status_code == 409
        with site.registry.acquire("sql"):  # a request that outlives the name
            assert (await site.client.delete("/v1/adapters/sql")).status_code == 202
        async with asyncio.timeout(30):
            while adapter_files.on_disk(site.data_dir) or staged(site.data_dir):  # noqa: ASYNC110  # a folder
                await asyncio.sleep(0.01)
    assert changes == []
