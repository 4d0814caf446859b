"""`/v1/models`, `/tokenize`, `/detokenize`, probes and `/metrics`."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from load_tests.fake_engine import empty_stats
from server.border.client import DEAD_FACTOR, HUNG_FACTOR
from server.messages import EngineStats, ErrorCode
from tests.api.face_site import ADAPTERS, Site, brought_back, eventually, open_site
from tests.api.fake_engine import FakeEngine


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        yield site


def stats(**fields: object) -> EngineStats:
    return msgspec.structs.replace(empty_stats(), **fields)


async def test_models(site: Site) -> None:
    listed = (await site.client.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["base", *ADAPTERS]
    base, sql = listed["data"][:2]
    assert (base["parent"], base["max_model_len"], base["adapter_version"]) == (None, 128, None)
    assert (sql["parent"], sql["adapter_version"]) == ("base", site.digest("sql"))
    assert "/tmp" not in sql["root"]
    assert (await site.client.get("/v1/models/base")).json() == base
    assert (await site.client.get("/v1/models/team/json")).json() == listed["data"][2]
    assert (await site.client.get("/v1/models/sql@1")).json() == sql | {"id": "sql@1"}
    missing = await site.client.get("/v1/models/nobody")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("path", "reading"), [("/v1/models", "current_versions"), ("/v1/adapters", "records")]
)
async def test_lists_are_made_beside_the_event_loop(
    site: Site, monkeypatch: pytest.MonkeyPatch, path: str, reading: str
) -> None:
    """Of thousands of adapters, or other requests would wait for them."""
    registry = site.face.require_registry()
    real, threads = getattr(registry, reading), []

    def read(**page: object) -> object:
        threads.append(threading.get_ident())
        return real(**page)

    monkeypatch.setattr(registry, reading, read)
    listed = (await site.client.get(path)).json()["data"]
    assert len(listed) >= len(ADAPTERS)
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


async def test_tokenize_and_back(site: Site) -> None:
    answer = (await site.client.post("/tokenize", json={"prompt": "hello", "return_token_strs": True})).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    text = (await site.client.post("/detokenize", json={"tokens": answer["tokens"]})).json()
    assert text == {"prompt": "hello"}
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    assert (await site.client.post("/tokenize", json=chat)).json()["tokens"][0] == 0
    for path, body, param in [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", **chat}, "prompt"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ]:
        refused = await site.client.post(path, json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param


async def test_before_and_after_the_engine_is_ready(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.load_gate = asyncio.Event()
    async with open_site(tmp_path, engine, wait=False) as site:
        assert (await site.client.get("/health/live")).status_code == 200
        for path in ("/health", "/health/ready"):
            response = await site.client.get(path)
            assert (response.status_code, response.json()) == (503, {"status": "starting"})
        for response in (await site.complete(), await site.client.get("/v1/adapters")):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
        assert (await site.client.get("/v1/models")).status_code == 503
        assert (await site.client.get("/metrics")).status_code == 200
        engine.load_gate.set()
        await eventually(lambda: site.face.ready)
        assert (await site.client.get("/health")).status_code == 200
        assert (await site.client.get("/v1/adapters")).status_code == 200


async def silent(site: Site, watchdogs: float) -> tuple[str, int]:
    """What `/health/ready` and `/health/live` say of an engine that has been silent for so long."""
    site.engine.last_heartbeat = time.monotonic() - watchdogs * site.face.settings.watchdog_s
    ready, live = [await site.client.get(f"/health/{probe}") for probe in ("ready", "live")]
    return ready.json()["status"], live.status_code


async def test_silence_makes_it_not_ready_then_not_live(site: Site) -> None:
    assert await silent(site, 0.5) == ("ready", 200)
    assert await silent(site, 1.1) == ("unresponsive", 200)
    assert await silent(site, DEAD_FACTOR + 1) == ("unresponsive", 503)


async def test_it_stays_live_until_a_hung_engine_was_killed_and_could_start_again(site: Site) -> None:
    """Else a liveness probe restarts the whole server while the engine is about to heal itself."""
    looks = 1  # the client looks once a watchdog_s, so that is how late it may see a hung engine
    assert await silent(site, HUNG_FACTOR + looks) == ("unresponsive", 200)
    site.engine.die()
    assert await silent(site, 100 * DEAD_FACTOR) == ("restarting", 200)


async def test_retry_after_is_what_the_engine_says(site: Site) -> None:
    """Wherever it is the engine that is missing."""
    site.engine.retry_after_s = 17
    site.say("the quick brown fox")
    site.engine.pause_after = 1
    open_request = asyncio.create_task(site.complete())
    await eventually(lambda: site.engine.running)
    site.engine.die()
    responses = [await open_request, await site.complete(), await site.chat()]
    responses += [await site.client.get("/health"), await site.client.post("/v1/adapters/sql/load")]
    for response in responses:
        assert (response.status_code, response.headers["retry-after"]) == (503, "17"), response.url
    site.face.registry = None
    assert (await site.client.get("/v1/adapters")).headers["retry-after"] == "17"


async def test_engine_that_cannot_start(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.failure = "qwen3_next is not supported"
    async with open_site(tmp_path, engine) as site:
        assert site.failures == ["qwen3_next is not supported"]
        assert (await site.client.get("/health/live")).status_code == 503


async def test_pinned_adapters_come_back(tmp_path: Path) -> None:
    async with open_site(tmp_path / "a") as site:
        site.face.require_registry().set_pinned("sql", True)
        assert site.engine.on_ready is not None
        restored = site.engine.on_ready(())  # as each life of the engine begins
        assert restored is not None
        await restored
        assert site.engine.pinned == [site.digest("sql")]


async def test_resident_adapters_come_back_the_pinned_first_then_the_most_recent(site: Site) -> None:
    sql, team = site.digest("sql"), site.digest("team/json")
    site.engine.accepts_calls = True
    assert await brought_back(site, (sql, "deleted since", team)) == [team, sql]
    site.face.require_registry().set_pinned("sql", True)
    assert await brought_back(site, (sql, team)) == [sql, team]
    assert site.engine.pinned == [sql]


async def test_an_adapter_that_does_not_load_does_not_keep_the_others(site: Site) -> None:
    sql, team = site.digest("sql"), site.digest("team/json")
    site.engine.accepts_calls = True
    site.engine.refuses = {team}
    assert await brought_back(site, (sql, team)) == [team, sql]


async def test_adapters_that_are_not_back_in_time_come_when_they_are_asked_for(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.face._RECENT_S", 0.01)
    resident = (site.digest("sql"), site.digest("team/json"))
    site.engine.accepts_calls = True
    site.engine.copy_gate = asyncio.Event()
    assert await brought_back(site, resident) == [resident[1]]


async def test_a_first_start_is_ready_when_its_pinned_adapters_are_there(tmp_path: Path) -> None:
    await pin(tmp_path, "sql")
    engine = FakeEngine()
    engine.copy_gate = asyncio.Event()
    async with open_site(tmp_path, engine, wait=False) as site:
        await eventually(lambda: engine.loaded)
        health = await site.client.get("/health/ready")
        assert (health.status_code, health.json()["status"]) == (503, "starting")
        assert (await site.complete()).status_code == 503
        engine.copy_gate.set()
        await eventually(lambda: site.face.ready)
        assert engine.pinned == [site.digest("sql")]
        assert (await site.client.get("/health/ready")).status_code == 200


async def test_a_pinned_adapter_that_cannot_be_loaded_keeps_no_start_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    engine.refuses = {await pin(tmp_path, "sql")}
    async with open_site(tmp_path, engine) as site:
        assert (await site.client.get("/health/ready")).status_code == 200
        assert "pinned adapter sql could not be loaded: refused" in caplog.text
        shown = (await site.client.get("/v1/adapters/sql")).json()
        assert (shown["pinned"], shown["last_load_ms"], shown["last_load_error"]) == (True, None, "refused")
        engine.refuses.clear()
        await site.client.post("/v1/adapters/sql/load")
        assert (await site.client.get("/v1/adapters/sql")).json()["last_load_error"] is None


async def test_a_pinned_adapter_that_hangs_keeps_no_start_up_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.app.RESTORE_S", 0.05)
    await pin(tmp_path, "sql")
    engine = FakeEngine()
    engine.copy_gate = asyncio.Event()
    async with open_site(tmp_path, engine) as site:
        assert (await site.client.get("/health/ready")).status_code == 200


async def pin(root: Path, name: str) -> str:
    """As an operator did before this start; its digest."""
    async with open_site(root) as site:
        site.face.require_registry().set_pinned(name, True)
        return site.digest(name)


async def test_a_silent_engine_is_asked_nothing(site: Site) -> None:
    """It would hold whoever asks for as long as it is silent."""
    site.engine.retry_after_s = 17
    site.engine.last_heartbeat = time.monotonic() - 1.1 * site.face.settings.watchdog_s
    for response in (await site.complete(), await site.chat()):
        assert (response.status_code, response.headers["retry-after"]) == (503, "17")
        assert response.json()["error"]["code"] == "engine_not_ready"
        assert "unresponsive" in response.json()["error"]["message"]
    assert site.engine.requests == []


async def test_metrics(site: Site) -> None:
    site.say("the quick brown fox")
    await site.complete(model="team/json")
    await site.complete(n=0)
    digest = site.digest("team/json")
    site.engine.stats = stats(
        running=3, waiting=2, kv_blocks_total=64, kv_blocks_free=16, kv_blocks_cached=16,
        resident=(digest, "f" * 64), waiting_digests=(digest,), preemptions=4,
    )  # fmt: skip
    text = (await site.client.get("/metrics")).text
    lines = text.splitlines()
    for line in (
        'vllm:num_requests_running{model_name="base"} 3.0',
        'vllm:num_requests_waiting{model_name="base"} 2.0',
        'vllm:kv_cache_usage_perc{model_name="base"} 0.5',
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="64"} 1.0',
        'chorus_requests_total{outcome="completed"} 1.0',
        'chorus_requests_total{outcome="rejected"} 1.0',
        "chorus_preemptions_total 4.0",
        "chorus_engine_ready 1.0",
        'vllm:time_to_first_token_seconds_count{model_name="base"} 1.0',
        'vllm:request_success_total{finished_reason="stop",model_name="base"} 1.0',
    ):
        assert line in lines
    (adapters,) = [line for line in lines if line.startswith("vllm:lora_requests_info{")]
    assert f'running_lora_adapters="{"f" * 12},team/json",waiting_lora_adapters="team/json"' in adapters
    assert abs(float(adapters.rsplit(" ", 1)[1]) - time.time()) < 60


async def test_metrics_stay_flat(site: Site) -> None:
    size = len((await site.client.get("/metrics")).text.splitlines())
    for at in range(50):
        await site.complete(model=f"nobody-{at}")
    assert len((await site.client.get("/metrics")).text.splitlines()) == size


async def test_figures_of_adapters(site: Site) -> None:
    site.say("the quick brown fox")
    await site.complete(model="team/json")
    site.engine.error, site.engine.error_after = ErrorCode.NON_FINITE, 1
    await site.complete(model="sql")
    await site.complete(model="sql", stream=True)
    await site.complete()
    site.engine.stats = stats(resident=(site.digest("team/json"),))
    text = (await site.client.get("/metrics/adapters")).text
    lines = text.splitlines()
    for line in (
        'chorus_adapter_requests_total{adapter="team/json",outcome="completed"} 1.0',
        'chorus_adapter_requests_total{adapter="sql",outcome="failed"} 2.0',
        'chorus_adapter_requests_total{adapter="*",outcome="completed"} 0.0',
        'chorus_adapter_time_to_first_token_seconds_count{adapter="team/json"} 1.0',
        'chorus_adapter_residency{adapter="team/json",location="arena"} 1.0',
        'chorus_adapter_residency{adapter="sql",location="disk"} 1.0',
    ):
        assert line in lines
    assert 'adapter="base"' not in text
