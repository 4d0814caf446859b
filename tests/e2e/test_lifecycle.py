"""Adapters come, change and go under traffic; the engine dies; the server stops: what clients see."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from safetensors.numpy import load_file, save_file

from tests.e2e.server import ADAPTERS, MODEL, Server

PROMPT = "Anna saw two red apples =>\n"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "data") as running:
        yield running


def scaled(source: Path, out: Path, factor: float) -> Path:
    """The same adapter with its B matrices scaled: other content, other answers."""
    out.mkdir()
    tensors = load_file(source / "adapter_model.safetensors")
    changed = {n: t * np.asarray(factor, t.dtype) if "lora_B" in n else t for n, t in tensors.items()}
    save_file(changed, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    return out


def stream(server: Server, model: str, tokens: int, into: list[dict[str, Any]]) -> None:
    """A streamed completion; appends each event's JSON."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as answer:
        into.append({"status": answer.status_code, "at": time.monotonic()})
        for line in answer.iter_lines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                into.append(
                    {"done": True} if data == "[DONE]" else json.loads(data) | {"at": time.monotonic()}
                )


def wait_for(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_upload_replace_delete_and_restart(tmp_path: Path) -> None:
    one = scaled(ADAPTERS / "upper", tmp_path / "one", 1.0)
    two = scaled(ADAPTERS / "upper", tmp_path / "two", -1.0)
    with Server(tmp_path / "data") as server:
        created = server.upload("mine", one)
        assert created.status_code == 201, created.text
        before = server.complete("mine", PROMPT)
        assert before["choices"][0]["text"] == server.complete("upper", PROMPT)["choices"][0]["text"]
        assert server.upload("mine", one).status_code == 409
        replaced = server.upload("mine", two, method="PUT")
        assert replaced.status_code == 200, replaced.text
        after = server.complete("mine", PROMPT)
        assert after["adapter_version"] != before["adapter_version"]
        assert after["choices"][0]["text"] != before["choices"][0]["text"]
    with Server(tmp_path / "data", adapters=None) as server:
        again = server.complete("mine", PROMPT)
        assert again["adapter_version"] == after["adapter_version"]
        assert again["choices"][0]["text"] == after["choices"][0]["text"]
        assert server.http.delete("/v1/adapters/mine").status_code in (200, 202)
        gone = server.http.post("/v1/completions", json={"model": "mine", "prompt": PROMPT})
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


def test_replace_under_traffic_gives_each_response_one_version(server: Server, tmp_path: Path) -> None:
    versions = [
        scaled(ADAPTERS / "upper", tmp_path / f"v{i}", 1.0 - 2.0 * (i % 2) + i / 100) for i in range(6)
    ]
    assert server.upload("mine", versions[0]).status_code == 201
    stop = threading.Event()
    seen: list[tuple[str, str]] = []

    def traffic() -> None:
        with httpx.Client(base_url=server.url, timeout=120) as http:
            while not stop.is_set():
                body = {
                    "model": "mine",
                    "prompt": PROMPT,
                    "temperature": 0,
                    "max_tokens": 24,
                    "ignore_eos": True,
                }
                answer = http.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                seen.append((answer.json()["adapter_version"], answer.json()["choices"][0]["text"]))

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(traffic) for _ in range(4)]
        try:
            for folder in versions[1:]:
                count = len(seen)
                wait_for(lambda count=count: len(seen) > count + 4)
                assert server.upload("mine", folder, method="PUT").status_code == 200
            count = len(seen)
            wait_for(lambda: len(seen) > count + 4)
        finally:
            stop.set()
        for client in clients:
            client.result()
    texts: dict[str, set[str]] = {}
    for version, text in seen:
        texts.setdefault(version, set()).add(text)
    assert len(texts) == len(versions)
    assert {version: len(found) for version, found in texts.items()} == dict.fromkeys(texts, 1)


def test_delete_lets_running_requests_finish(server: Server, tmp_path: Path) -> None:
    assert server.upload("mine", scaled(ADAPTERS / "upper", tmp_path / "one", 1.0)).status_code == 201
    events: list[dict[str, Any]] = []
    client = threading.Thread(target=stream, args=(server, "mine", 600, events))
    client.start()
    wait_for(lambda: len(events) > 3)
    assert server.http.delete("/v1/adapters/mine").status_code in (200, 202)
    refused = server.http.post("/v1/completions", json={"model": "mine", "prompt": PROMPT})
    assert refused.status_code == 404
    client.join(120)
    assert events[-1] == {"done": True}
    assert not any("error" in event for event in events)


def test_an_engine_that_dies_under_load_comes_back_with_its_adapters(server: Server, tmp_path: Path) -> None:
    assert server.upload("mine", scaled(ADAPTERS / "upper", tmp_path / "one", 1.0)).status_code == 201
    want = server.complete("mine", PROMPT)["choices"][0]["text"]
    streams: list[list[dict[str, Any]]] = [[] for _ in range(12)]
    models = ["mine", "upper", MODEL.name, "sort"]
    clients = [
        threading.Thread(target=stream, args=(server, models[i % 4], 1500, events))
        for i, events in enumerate(streams)
    ]
    for client in clients:
        client.start()
    wait_for(lambda: all(len(events) > 2 for events in streams))
    os.kill(server.engine_pid(), signal.SIGKILL)
    killed = time.monotonic()
    for client in clients:
        client.join(30)
    for events in streams:
        assert events[-1] == {"done": True}
        assert events[-2]["error"]["code"] == "engine_restarted"
        assert events[-2]["at"] - killed < 1.0
    server.wait_ready()
    residency = {name: server.http.get(f"/v1/adapters/{name}").json()["residency"] for name in models[:2]}
    assert residency == {"mine": "arena", "upper": "arena"}  # before anybody has asked for them
    assert server.complete("mine", PROMPT)["choices"][0]["text"] == want


def test_sigterm_drains(server: Server) -> None:
    events: list[dict[str, Any]] = []
    client = threading.Thread(target=stream, args=(server, "upper", 400, events))
    client.start()
    wait_for(lambda: len(events) > 3)
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: server.http.get("/health/ready").status_code == 503)
    refused = server.http.post("/v1/completions", json={"model": "upper", "prompt": PROMPT})
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    client.join(60)
    assert events[-1] == {"done": True}
    assert not any("error" in event for event in events)
    assert server.process.wait(60) == 0


def test_sigterm_ends_what_outlasts_the_grace(tmp_path: Path) -> None:
    with Server(tmp_path / "data", "--shutdown-grace-s", "0.5") as server:
        events: list[dict[str, Any]] = []
        client = threading.Thread(target=stream, args=(server, "upper", 1900, events))
        client.start()
        wait_for(lambda: len(events) > 3)
        server.process.send_signal(signal.SIGTERM)
        client.join(60)
        assert events[-1] == {"done": True}
        assert "error" in events[-2]
        assert server.process.wait(60) == 0


def test_a_client_that_leaves_frees_its_blocks(server: Server) -> None:
    def gauge(name: str) -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))

    body = {"model": "upper", "prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()  # kept: httpx closes the connection when its iterator goes
        next(lines)
        wait_for(lambda: gauge("vllm:num_requests_running") == 1)
    wait_for(lambda: gauge("vllm:num_requests_running") == 0)


def test_operators_calls(server: Server, tmp_path: Path) -> None:
    call = server.http.post
    path = str(ADAPTERS / "sort")
    loaded = call("/v1/load_lora_adapter", json={"lora_name": "again", "lora_path": path, "extra": 1})
    assert loaded.status_code == 200, loaded.text
    assert call("/v1/load_lora_adapter", json={"lora_name": "again", "lora_path": path}).status_code == 400
    outside = call("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(tmp_path)})
    assert outside.status_code == 403
    missing = call("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(ADAPTERS / "none")})
    assert missing.status_code == 404
    assert server.complete("again", "pear apple =>\n")["choices"][0]["text"]
    assert call("/v1/unload_lora_adapter", json={"lora_name": "again"}).status_code == 200
    assert call("/v1/unload_lora_adapter", json={"lora_name": "again"}).status_code == 404


def test_a_second_server_on_the_same_data_directory_refuses(server: Server, tmp_path: Path) -> None:
    other = Server(tmp_path / "data")
    with pytest.raises(RuntimeError, match="lock"), other:
        pass
    assert other.process.returncode == 1


def test_the_official_sdk(bundled: Server) -> None:
    client = openai.OpenAI(base_url=f"{bundled.url}/v1", api_key="none", max_retries=0)
    names = {model.id for model in client.models.list()}
    assert {MODEL.name, "upper", "sort"} <= names
    assert client.models.retrieve("upper").id == "upper"
    whole = client.completions.create(model="upper", prompt=PROMPT, max_tokens=24, temperature=0)
    pieces = client.completions.create(
        model="upper", prompt=PROMPT, max_tokens=24, temperature=0, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens > 0
    chat = client.chat.completions.create(
        model="upper", messages=[{"role": "user", "content": "Anna saw two red apples"}], temperature=0
    )
    assert chat.choices[0].message.content
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="nobody", prompt="x")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="upper", prompt="x", max_tokens=10**6)
    assert too_long.value.param == "max_tokens"
