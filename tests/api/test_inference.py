"""Completions and chats: shapes, streams, adapters, what is held and given back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from server.api.inference.generation import engine_error
from server.messages import ErrorCode, Request, TokenOutput
from tests.api.face_site import Site, drained, events, eventually, open_site
from tests.api.fake_engine import FakeEngine, engine_info


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        site.say("the quick brown fox")
        yield site


MIX = [{"name": "sql"}, {"name": "team/json", "weight": 0.0}]  # each of rank 4


@pytest.mark.parametrize(
    ("limit", "fields", "param"),
    [
        (7, {"adapters": MIX}, "adapters"),
        (3, {"model": "sql"}, "model"),
        (3, {"adapter": "sql@1"}, "adapter"),
        (3, {"adapters": MIX[:1]}, "adapters"),
    ],
)
async def test_mixes_that_the_kernels_cannot_take(
    tmp_path: Path, limit: int, fields: dict[str, Any], param: str
) -> None:
    engine = FakeEngine()
    async with open_site(tmp_path, engine) as site:
        engine.info = engine_info(max_mix_rank=limit)  # lower than when they were registered
        for response in (await site.complete(**fields), await site.chat(stream=True, **fields)):
            assert response.status_code == 400
            error = response.json()["error"]
            assert (error["param"], error["code"]) == (param, "unsupported")
            assert str(limit) in error["message"]
        assert (await site.complete()).status_code == 200
        assert len(engine.requests) == 1
        assert site.leases() == 0


async def test_mixes_within_the_limit_of_the_kernels(tmp_path: Path) -> None:
    async with open_site(tmp_path, FakeEngine(max_mix_rank=8)) as site:
        site.say("yes")
        assert (await site.complete(adapters=MIX)).status_code == 200


async def test_completion(site: Site) -> None:
    answer = (await site.complete(max_tokens=50)).json()
    assert answer["object"] == "text_completion"
    assert answer["model"] == "base"
    assert answer["adapter_version"] is None
    choice = answer["choices"][0]
    assert choice == {
        "index": 0, "text": "the quick brown fox", "logprobs": None, "finish_reason": "stop"
    }  # fmt: skip
    request = site.engine.requests[0]
    assert answer["usage"] == {
        "prompt_tokens": len(request.prompt_token_ids),
        "completion_tokens": len(site.engine.tokens) + 1,
        "total_tokens": len(request.prompt_token_ids) + len(site.engine.tokens) + 1,
        "prompt_tokens_details": {"cached_tokens": min(3, len(request.prompt_token_ids))},
    }


async def test_default_lengths(site: Site) -> None:
    site.engine.tokens = [7] * 500
    answer = (await site.complete()).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 16
    usage = (await site.chat()).json()["usage"]
    assert usage["total_tokens"] == 128


async def test_stream_of_completion(site: Site) -> None:
    response = await site.complete(stream=True, max_tokens=50, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage = events(response.text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "the quick brown fox"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(site.engine.tokens) + 1
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1


async def test_chat_and_its_stream(site: Site) -> None:
    answer = (await site.chat()).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"] == {
        "content": "the quick brown fox", "role": "assistant", "refusal": None
    }  # fmt: skip
    prompt = site.engine.requests[0].prompt_token_ids
    assert site.face.tokenizer is not None
    shown = site.face.tokenizer.decode(prompt, skip_special_tokens=False)
    assert shown == "<s><|user|>hello</s><|assistant|>"
    chunks = events((await site.chat(stream=True)).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == "the quick brown fox"
    assert "usage" not in chunks[-1]


async def test_several_prompts_and_choices(site: Site) -> None:
    answer = (await site.complete(prompt=["hello", "world"], n=2, seed=5, max_tokens=40)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [request.sampling.seed for request in site.engine.requests] == [5, 6, 5, 6]
    assert len({request.request_id for request in site.engine.requests}) == 4
    prompts = {tuple(request.prompt_token_ids) for request in site.engine.requests}
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    streamed = events((await site.complete(prompt=[[5, 6], [7]], n=2, stream=True, max_tokens=40)).text)
    texts: dict[int, str] = {}
    for chunk in streamed:
        choice = chunk["choices"][0]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == dict.fromkeys(range(4), "the quick brown fox")


async def test_token_ids_and_echo(site: Site) -> None:
    tokens = [*site.engine.tokens, 1]
    choice = (await site.complete(prompt=[5, 6], max_tokens=40, return_token_ids=True)).json()["choices"][0]
    assert choice["token_ids"] == tokens
    assert choice["prompt_token_ids"] == [5, 6]
    chunks = events((await site.complete(stream=True, max_tokens=40, return_token_ids=True, echo=True)).text)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [token for choice in choices for token in choice["token_ids"]] == tokens
    assert [("prompt_token_ids" in choice) for choice in choices] == [True] + [False] * (len(choices) - 1)
    assert "".join(choice["text"] for choice in choices) == "hellothe quick brown fox"


async def test_stop_string_ends_and_aborts(site: Site) -> None:
    for per_output in (1, 3, 100):
        site.engine.per_output = per_output
        site.engine.aborted.clear()
        body = {"stop": "brown", "max_tokens": 60}
        answer = (await site.complete(**body)).json()
        assert answer["choices"][0]["text"] == "the quick "
        assert answer["choices"][0]["finish_reason"] == "stop"
        streamed = events((await site.complete(**body, stream=True)).text)
        assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == "the quick "
        if per_output == 1:
            assert len(site.engine.aborted) == 2
        included = (await site.complete(**body, include_stop_str_in_output=True)).json()
        assert included["choices"][0]["text"] == "the quick brown"


async def test_a_stop_string_ends_its_own_choice_alone(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of three choices says something else."""
    spoken, outputs = site.engine.tokens, site.engine._outputs

    def each_its_own(request: Request) -> list[TokenOutput]:
        site.engine.tokens = spoken if request.sampling.seed == 8 else spoken[:2]
        return outputs(request)

    monkeypatch.setattr(site.engine, "_outputs", each_its_own)
    answer = (await site.complete(n=3, seed=7, stop="brown", max_tokens=40)).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts[1] == "the quick "
    assert texts[0] == texts[2]
    assert "the quick ".startswith(texts[0])
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 3
    assert site.engine.aborted == [site.engine.requests[1].request_id]


async def test_no_stop_string_before_min_tokens(site: Site) -> None:
    body = {"stop": ["the", "fox"], "min_tokens": 2, "max_tokens": 60}
    assert (await site.complete(**body)).json()["choices"][0]["text"] == "the quick brown "


async def test_logprobs(site: Site) -> None:
    choice = (await site.complete(logprobs=2, max_tokens=40)).json()["choices"][0]
    columns = choice["logprobs"]
    assert "".join(columns["tokens"][:-1]) == "the quick brown fox"
    assert columns["text_offset"][1] == len(columns["tokens"][0])
    assert all(len(top) == 3 for top in columns["top_logprobs"])  # the sampled one is none of the likeliest
    content = (await site.chat(logprobs=True, top_logprobs=1)).json()["choices"][0]["logprobs"]["content"]
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
    assert [len(entry["top_logprobs"]) for entry in content] == [1] * len(content)


async def test_half_characters_are_not_sent(site: Site) -> None:
    site.say("a 🙂 b")
    chunks = events((await site.complete(stream=True, max_tokens=40)).text)
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == "a 🙂 b"
    assert not any("\ufffd" in text for text in texts)


@pytest.mark.parametrize(
    ("naming", "weights"),
    [
        ({"model": "sql"}, {"sql": 1.0}),
        ({"model": "sql@1"}, {"sql": 1.0}),
        ({"model": "base", "adapter": "team/json"}, {"team/json": 1.0}),
        ({"model": None, "adapter": "sql", "adapter_scale": 0.5}, {"sql": 0.5}),
        (
            {"adapters": [{"name": "sql", "weight": 0.5}, {"name": "team/json"}], "adapter_scale": 2},
            {"sql": 1.0, "team/json": 2.0},
        ),
    ],
)
async def test_naming_adapters(site: Site, naming: dict[str, Any], weights: dict[str, float]) -> None:
    answer = (await site.complete(**naming)).json()
    assert answer["model"] == (naming.get("model", "base") or "base")
    refs = site.engine.requests[0].adapters
    assert {ref.digest: ref.weight for ref in refs} == {site.digest(n): w for n, w in weights.items()}
    assert answer["adapter_version"] == "+".join(ref.digest for ref in refs)
    assert all((Path(ref.path) / "adapter_model.safetensors").is_file() for ref in refs)
    record = site.face.require_registry().get(next(iter(weights)))
    assert (record.requests, record.tokens) == (1, answer["usage"]["completion_tokens"])
    assert site.leases() == 0


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ErrorCode.NON_FINITE, 500, "non_finite_logits"),
        (ErrorCode.OUT_OF_MEMORY, 503, "out_of_accelerator_memory"),
        (ErrorCode.ADAPTER_LOAD_FAILED, 500, "adapter_load_failed"),
        (ErrorCode.ADAPTER_DAMAGED, 500, "adapter_damaged"),
        (ErrorCode.NEVER_FITS, 400, "never_fits"),
        (ErrorCode.INTERNAL, 500, "internal_error"),
    ],
)
async def test_engine_errors(site: Site, error: ErrorCode, status: int, code: str) -> None:
    site.engine.error = error
    for stream in (False, True):  # nothing was sent yet, so that a stream has its status, too
        response = await site.complete(model="sql", stream=stream)
        assert response.status_code == status
        assert response.json()["error"]["code"] == code
        assert response.headers.get("retry-after") == ("1" if status == 503 else None)
        assert response.headers.get("x-should-retry") == ("false" if status == 500 else None)
    site.engine.error_after = 2
    assert (await site.complete(model="sql", n=2)).status_code == status
    assert events((await site.complete(model="sql", stream=True)).text)[-1]["error"]["code"] == code
    assert site.engine.running == set()
    assert site.leases() == 0


def test_digests_of_damaged_files_are_for_the_log() -> None:
    """Of a shared adapter they would tell others whether its content is the same as theirs."""
    said = "their digest is 0123456789ab, not ba9876543210"
    output = TokenOutput("r", [], "error", error=ErrorCode.ADAPTER_DAMAGED, message=said)
    shown = engine_error(output)
    assert shown.message == "The stored files of the adapter are damaged; upload it again."


async def test_engine_death_ends_open_requests(site: Site) -> None:
    site.engine.pause_after = 2
    whole = asyncio.create_task(site.complete(model="sql"))
    streamed = asyncio.create_task(site.complete(model="sql", stream=True))
    await eventually(lambda: len(site.engine.running) == 2)
    await asyncio.sleep(0.02)
    site.engine.die()
    response = await whole
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_restarted"
    assert events((await streamed).text)[-1]["error"]["code"] == "engine_restarted"
    assert (await site.complete()).status_code == 503
    assert site.leases() == 0


class HungUp:
    """An ASGI client that goes away when told to; `sent` is what it got."""

    def __init__(self, path: str, body: dict[str, Any]) -> None:
        self.gone = asyncio.Event()
        self.sent: list[Any] = []
        self._body: bytes | None = json.dumps(body).encode()
        self.scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(b"host", b"chorus")], "http_version": "1.1", "scheme": "http", "root_path": "",
        }  # fmt: skip

    async def receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pause_after", [0, 2])
async def test_disconnect_aborts_and_gives_back(site: Site, stream: bool, pause_after: int) -> None:
    site.engine.pause_after = pause_after
    client = HungUp("/v1/completions", {"model": "sql", "prompt": "hello", "n": 3, "stream": stream})
    served = asyncio.create_task(site.app(client.scope, client.receive, client.send))  # type: ignore[arg-type]  # an ASGI scope is a dict
    await eventually(lambda: len(site.engine.running) == 3)
    client.gone.set()
    await served
    assert len(site.engine.aborted) == 3
    assert bool(client.sent) == (stream and pause_after > 0)
    assert b'outcome="aborted"} 1.0' in site.face.metrics.render()
    assert b'{finished_reason="abort",model_name="base"} 3.0' in site.face.metrics.render()
    of_adapter = b'chorus_adapter_requests_total{adapter="sql",outcome="aborted"} 1.0'
    assert of_adapter in site.face.metrics.render_adapters()
    await drained(site)
    assert site.leases() == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelled_handler_gives_back(site: Site, stream: bool) -> None:
    site.engine.pause_after = 1
    client = HungUp("/v1/completions", {"model": "sql", "prompt": "hello", "stream": stream})
    served = asyncio.create_task(site.app(client.scope, client.receive, client.send))  # type: ignore[arg-type]  # an ASGI scope is a dict
    await eventually(lambda: site.engine.running)
    served.cancel()
    await asyncio.wait([served])
    assert len(site.engine.aborted) == 1
    assert site.leases() == 0


async def test_drain(site: Site) -> None:
    site.engine.pause_after = 2
    body = {"model": "sql", "max_tokens": 40}
    patient = asyncio.create_task(site.complete(**body, stream=True))
    await eventually(lambda: site.engine.running)
    drain = asyncio.create_task(site.face.drain.finish(30))
    await asyncio.sleep(0)
    assert (await site.client.get("/health/ready")).json() == {"status": "draining"}
    assert (await site.client.get("/health/live")).status_code == 200
    refused = await site.complete()
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert not drain.done()
    site.engine.resume.set()
    assert "".join(c["choices"][0]["text"] for c in events((await patient).text)) == "the quick brown fox"
    await drain


async def test_drain_cuts_after_the_grace(site: Site) -> None:
    site.engine.pause_after = 2
    streamed = asyncio.create_task(site.complete(model="sql", stream=True))
    whole = asyncio.create_task(site.chat(model="sql"))
    await eventually(lambda: len(site.engine.running) == 2)
    await asyncio.sleep(0.02)
    await site.face.drain.finish(0.01)
    assert events((await streamed).text)[-1]["error"]["code"] == "shutting_down"
    assert (await whole).status_code == 503
    assert len(site.engine.aborted) == 2
    assert site.leases() == 0


async def test_without_a_tokenizer(tmp_path: Path) -> None:
    async with open_site(tmp_path, FakeEngine(), tokenizer=False) as site:
        refused = await site.complete()
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "prompt"
        assert (await site.chat()).json()["error"]["param"] == "messages"
        assert (await site.complete(prompt=[5], stop="x")).json()["error"]["param"] == "stop"
        site.engine.tokens = [9, 8]
        choice = (await site.complete(prompt=[5, 6], return_token_ids=True)).json()["choices"][0]
        assert (choice["text"], choice["token_ids"]) == ("", [9, 8, 1])
        chunks = events((await site.complete(prompt=[5], stream=True, return_token_ids=True)).text)
        assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[9], [8], [1]]


async def test_an_engine_without_a_sign_of_life_gets_no_more_work(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        site.engine.last_heartbeat -= 1000
        site.engine.retry_after_s = 7
        for refused in (
            await site.complete(),
            await site.chat(),
            await site.client.post("/v1/adapters/sql/load"),
            await site.client.post("/v1/adapters/sql/unload"),
        ):
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "7")
            assert refused.json()["error"]["code"] == "engine_not_ready"
            assert "unresponsive" in refused.json()["error"]["message"]
        assert not site.engine.requests
