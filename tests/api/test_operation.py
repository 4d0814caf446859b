"""The facts of a route: every route has them, and what they change."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from fastapi import APIRouter

from server.api.app import ROUTERS
from server.api.operation import Operation, operations
from tests.api.face_site import Site, open_site


def test_a_route_without_facts_is_refused() -> None:
    router = APIRouter()

    @router.get("/known")
    @Operation({200: str}, scopes=("infer",))
    async def known() -> None: ...

    assert [(path, method) for path, method, _ in operations(router)] == [("/known", "GET")]

    @router.get("/forgotten/{name:path}")
    async def forgotten(name: str) -> None: ...

    with pytest.raises(ValueError, match="/forgotten"):
        list(operations(router))


def test_a_route_that_asks_for_no_scope_is_refused() -> None:
    """Deny by default: neither does it stand open, nor is there a way to leave the scopes out."""
    router = APIRouter()

    @router.get("/nothing")
    @Operation({200: str}, scopes=())
    async def nothing() -> None: ...

    with pytest.raises(ValueError, match="/nothing must name scopes"):
        list(operations(router))
    with pytest.raises(TypeError, match="scopes"):
        Operation({200: str})  # type: ignore[call-arg]  # the point of the test


async def counted(site: Site) -> int:
    text = (await site.client.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("chorus_requests_total{")]
    return sum(int(float(line.rpartition(" ")[2])) for line in lines)


async def test_which_requests_are_counted_and_which_lines_are_for_debugging(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "server.access")
    async with open_site(tmp_path) as site:
        for path, method, facts in operations(*ROUTERS):
            if method == "HEAD":
                continue
            before = await counted(site)
            caplog.clear()
            await site.client.request(
                method,
                path.format(kind="tenant", name="nobody", model_id="nobody", key_id="nobody"),
                content=b"{}",
            )
            (line,) = [record for record in caplog.records if record.name == "server.access"]
            assert (line.levelno == logging.DEBUG) == facts.quiet, path
            assert await counted(site) - before == facts.counted, path
        before = await counted(site)
        await site.client.get("/nowhere")
        assert await counted(site) == before
    quiet = {path for path, _, facts in operations(*ROUTERS) if facts.quiet}
    assert quiet == {"/health", "/health/live", "/health/ready", "/metrics", "/metrics/adapters"}
    inference = {path for path, _, facts in operations(*ROUTERS) if facts.counted}
    assert inference == {"/v1/completions", "/v1/chat/completions"}
