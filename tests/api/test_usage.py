"""`GET /v1/usage`, and what of a request it counts."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.messages import ErrorCode
from tests.api.face_site import Site, events, eventually, listen, open_site
from tests.api.test_tenants import Tenants, open_tenants

SUMS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        site.say("yes")
        yield site


@pytest.fixture
async def tenants(tmp_path: Path) -> AsyncIterator[Tenants]:
    async with open_tenants(tmp_path) as tenants:
        yield tenants


async def lines(site: Site, **query: str) -> list[dict[str, Any]]:
    answer = await site.client.get("/v1/usage", params=query)
    assert answer.status_code == 200, answer.text
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


async def total(site: Site) -> tuple[int, ...]:
    (line,) = await lines(site, group_by="")
    return tuple(line[name] for name in SUMS)


def of_usage(*usages: dict[str, Any]) -> tuple[int, ...]:
    """The sums that those of answers' `usage` make."""
    return (
        len(usages),
        sum(usage["prompt_tokens"] for usage in usages),
        sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages),
        sum(usage["completion_tokens"] for usage in usages),
    )


async def test_it_is_what_the_answers_said(site: Site) -> None:
    usages = []
    for fields in (
        {},
        {"n": 3},
        {"prompt": ["hello", "you", "there"], "n": 2},
        {"stop": "e"},
        {"model": "sql"},
    ):
        for more in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
            answer = await site.complete(**fields, **more)
            usages.append(events(answer.text)[-1]["usage"] if more else answer.json()["usage"])
    assert await total(site) == of_usage(*usages)
    by_adapter = await lines(site, group_by="adapter,version")
    assert [(line["adapter"], line["version"]) for line in by_adapter] == [
        ("base", ""),
        ("sql", site.digest("sql")),
    ]
    assert by_adapter[1]["requests"] == 2


async def test_a_composition_is_one_line(site: Site) -> None:
    await site.complete(model="base", adapters=[{"name": "sql"}, {"name": "team/json"}])
    (line,) = await lines(site)
    assert (line["adapter"], line["requests"]) == ("sql+team/json", 1)
    assert line["version"] == f"{site.digest('sql')}+{site.digest('team/json')}"


async def test_a_stream_that_fails_counts_what_was_sent(site: Site) -> None:
    site.engine.error, site.engine.error_after = ErrorCode.NON_FINITE, 2
    answer = await site.complete(stream=True, return_token_ids=True)
    sent = [token for each in events(answer.text)[:-1] for token in each["choices"][0]["token_ids"]]
    assert (await total(site))[0::3] == (1, len(sent)) == (1, 2)


async def test_what_gave_nothing_counts_nothing(site: Site) -> None:
    site.engine.error = ErrorCode.NON_FINITE
    for fields in ({}, {"stream": True}, {"model": "nobody"}, {"max_tokens": 0}):
        assert (await site.complete(**fields)).status_code >= 400
    assert await lines(site) == []


async def test_the_engine_dies_in_a_stream(site: Site) -> None:
    site.engine.pause_after = 2
    asked = asyncio.create_task(site.complete(stream=True, return_token_ids=True))
    await eventually(lambda: bool(site.engine.running))
    await asyncio.sleep(0.1)  # until both outputs came; if they did not, nothing is wrong either
    site.engine.die()
    *chunks, error = events((await asked).text)
    assert error["error"]["code"] == "engine_restarted"
    sent = [token for each in chunks for token in each["choices"][0]["token_ids"]]
    site.engine.state = "ready"
    assert (await total(site))[3] == len(sent) == 2


async def test_pages_and_filters(site: Site) -> None:
    for model in ("base", "sql", "team/json"):
        await site.complete(model=model)
    found: list[dict[str, Any]] = []
    after = ""
    while True:
        page = (await site.client.get("/v1/usage", params={"limit": 1, "after": after})).json()
        found += page["data"]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert found == await lines(site)
    assert [line["adapter"] for line in found] == ["base", "sql", "team/json"]
    assert [line["adapter"] for line in await lines(site, adapter="sql")] == ["sql"]
    hour = found[0]["hour"]
    assert len(await lines(site, start=hour)) == 3
    assert await lines(site, end=hour) == await lines(site, start="2100-01-01") == []
    assert await lines(site, key="x") == await lines(site, tenant="x") == []
    (everything,) = await lines(site, group_by="")
    assert everything["requests"] == 3
    (day,) = await lines(site, group_by="day")
    assert day["day"] == hour[:10]


async def test_csv(site: Site) -> None:
    empty = (await site.client.get("/v1/usage?format=csv&group_by=adapter")).text
    assert empty == "adapter,requests,prompt_tokens,cached_tokens,completion_tokens\r\n"
    await site.complete(model="sql")
    await site.complete()
    by_name = await site.client.get("/v1/usage?format=csv")
    by_header = await site.client.get("/v1/usage", headers={"accept": "text/csv"})
    assert by_name.text == by_header.text
    assert by_name.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(by_name.text)))
    assert rows == [
        {name: str(value) for name, value in line.items() if name not in ("object", "id")}
        for line in await lines(site)
    ]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("start=yesterday", "start"), ("end=2026-13-01", "end"), ("group_by=colour", "group_by"),
        ("format=xml", "format"), ("limit=0", "limit"), ("after=x", "after"), ("after=WzFd", "after"),
        ("colour=red", "colour"), ("tenant=A", "x-chorus-tenant"), ("after=WzFlOTksIngiXQ==", "after"),
    ],
)  # fmt: skip
async def test_what_cannot_be_asked(site: Site, query: str, param: str) -> None:
    answer = await site.client.get(f"/v1/usage?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_a_tenant_sees_its_own(tenants: Tenants) -> None:
    await tenants.acme.upload("mine")
    await tenants.acme.complete("mine")
    await tenants.other.complete("base")
    await tenants.operator.complete("base")

    def seen(answer: Any) -> list[tuple[str, str]]:
        assert answer.status_code == 200, answer.text
        return [(line["tenant"], line["adapter"]) for line in answer.json()["data"]]

    mine = [("acme", "acme:mine")]
    assert seen(await tenants.acme.ask("GET", "/v1/usage")) == mine
    assert seen(await tenants.acme.ask("GET", "/v1/usage?tenant=acme&adapter=mine")) == mine
    assert (await tenants.acme.ask("GET", "/v1/usage?tenant=other")).status_code == 403
    everybody = [*mine, ("default", "base"), ("other", "base")]
    assert seen(await tenants.operator.ask("GET", "/v1/usage")) == everybody
    assert seen(await tenants.operator.ask("GET", "/v1/usage?tenant=acme")) == mine
    headers = {"x-chorus-tenant": "acme"}
    assert seen(await tenants.operator.ask("GET", "/v1/usage", headers=headers)) == mine
    line = (await tenants.acme.ask("GET", "/v1/usage")).json()["data"][0]
    keys = (await tenants.operator.ask("GET", "/v1/keys?tenant=acme")).json()["data"]
    assert line["key"] == keys[0]["id"]


async def test_it_survives_a_restart(tmp_path: Path) -> None:
    for life in (1, 2):
        if life == 2:
            (tmp_path / "2").mkdir()
            (tmp_path / "1" / "data").rename(tmp_path / "2" / "data")
        async with open_site(tmp_path / str(life)) as site:
            site.say("yes")
            await site.complete()
            assert (await total(site))[0] == life


async def test_the_command(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    await site.complete(model="sql")
    async with listen(site.app) as url:

        def run(*words: str) -> str:
            result = CliRunner().invoke(app, ["usage", "--server", url, *words])
            assert result.exit_code == 0, result.output
            return result.stdout

        assert "sql" in await asyncio.to_thread(run)
        assert '"requests": 1' in await asyncio.to_thread(run, "--json")
        assert (
            (await asyncio.to_thread(run, "--csv", "--group-by", "adapter"))
            .splitlines()[1]
            .startswith("sql,1,")
        )
