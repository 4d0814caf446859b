"""The official SDK against the server on a port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from server.messages import ErrorCode
from tests.api.face_site import Site, drained, eventually, listen, open_site

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        site.say("the quick brown fox")
        yield site


@pytest.fixture
async def client(site: Site) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        listen(site.app) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def test_completions(client: openai.AsyncOpenAI, site: Site) -> None:
    answer = await client.completions.create(model="sql", prompt="hello", max_tokens=40, logprobs=1)
    assert answer.choices[0].text == "the quick brown fox"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.to_dict()["adapter_version"] == site.digest("sql")
    text = ""
    async for chunk in await client.completions.create(model="base", prompt=[5], stream=True, max_tokens=40):
        text += chunk.choices[0].text
    assert text == "the quick brown fox"


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="base", messages=MESSAGES, logprobs=True, top_logprobs=2, max_completion_tokens=40
    )
    assert answer.choices[0].message.content == "the quick brown fox"
    assert answer.choices[0].logprobs is not None
    again = [*MESSAGES, answer.choices[0].message.to_dict(), *MESSAGES]
    stream = await client.chat.completions.create(
        model="base",
        messages=again,
        stream=True,
        stream_options={"include_usage": True},  # type: ignore[arg-type]  # a message as it came
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "the quick brown fox"
    assert chunks[-1].usage is not None
    assert chunks[-2].choices[0].finish_reason == "stop"


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["base", "sql", "team/json"]
    assert (await client.models.retrieve("sql")).id == "sql"


async def test_errors(client: openai.AsyncOpenAI, site: Site) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="nobody", prompt="hello")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model="base", prompt="hello", temperature=5)
    assert bad.value.param == "temperature"
    assert bad.value.request_id
    site.engine.error, site.engine.error_after = ErrorCode.OUT_OF_MEMORY, 2
    stream = await client.completions.create(model="base", prompt="hello", stream=True)
    with pytest.raises(openai.APIError) as broken:
        async for _ in stream:
            pass
    assert broken.value.code == "out_of_accelerator_memory"
    site.engine.die()
    with pytest.raises(openai.APIStatusError) as down:
        await client.completions.create(model="base", prompt="hello")
    assert down.value.status_code == 503


async def test_pointless_retries_are_not_made(client: openai.AsyncOpenAI, site: Site) -> None:
    site.engine.error = ErrorCode.NON_FINITE
    with pytest.raises(openai.InternalServerError):
        await client.with_options(max_retries=3).completions.create(model="base", prompt="hello")
    assert len(site.engine.requests) == 1


async def test_closing_a_stream_aborts(client: openai.AsyncOpenAI, site: Site) -> None:
    site.engine.pause_after = 1
    stream = await client.completions.create(model="sql", prompt="hello", stream=True, max_tokens=40)
    await stream.close()
    await eventually(lambda: len(site.engine.aborted) == 1)
    await drained(site)
    assert site.leases() == 0
