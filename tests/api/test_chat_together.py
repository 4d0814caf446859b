"""Fields of chats that meet: tools, forms, log-probabilities, echo, and how the prompt is rendered."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from server.api.inference.chat_text import ChatStyle
from server.messages import ErrorCode, TokenOutput
from server.text.tool_calls import STYLES
from tests.api.face_site import Site, events
from tests.api.test_tools import CALL, TOOLS, deltas, message, site, site_of

__all__ = ["site"]  # the fixture

BEGUN = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the quick"}]
CONTINUED: dict[str, Any] = {"messages": BEGUN, "continue_final_message": True}
SHOWS_ALL = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}{{ (documents or [{}])[0].title }}|"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ message.mood }}"
    "{% for call in message.tool_calls or [] %}({{ call.function.name }}{{ call.function.arguments.n }})"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<go>{% endif %}"
)


@pytest.mark.parametrize("mode", ["raw", "processed"])
async def test_a_form_with_log_probabilities_and_echo(site: Site, mode: str) -> None:
    asked = CONTINUED | {
        "regex": "[^x]+", "logprobs": True, "top_logprobs": 2, "logprobs_mode": mode, "echo": True,
        "return_token_ids": True,
    }  # fmt: skip
    answer = (await site.chat(max_tokens=200, **asked)).json()
    (choice,) = answer["choices"]
    (request,) = site.engine.requests
    assert request.sampling.grammar is not None
    assert request.sampling.processed_logprobs is (mode == "processed")
    assert choice["message"]["content"] == "the quick" + CALL
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])
    assert answer["prompt_token_ids"] == request.prompt_token_ids
    parts = await deltas(site, **asked)
    assert "".join(part["delta"].get("content", "") for part in parts) == "the quick" + CALL
    told = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
    assert told == choice["logprobs"]["content"]


async def test_prompt_log_probabilities_beside_a_form_and_beside_tools(site: Site) -> None:
    for fields in ({"regex": "[^x]+"}, {"tools": TOOLS, "tool_choice": "required"}):
        answer = (await site.chat(max_tokens=200, prompt_logprobs=2, **fields)).json()
        told, prompt = answer["prompt_logprobs"], site.engine.requests[-1].prompt_token_ids
        assert told[0] is None
        assert len(told) == len(prompt)
        assert all(str(token) in entry for token, entry in zip(prompt[1:], told[1:], strict=True))
        assert site.engine.requests[-1].sampling.grammar is not None


async def test_an_echo_stands_before_calls(site: Site) -> None:
    asked = CONTINUED | {"tools": TOOLS, "echo": True}
    said = await message(site, **asked)
    assert said["content"] == "the quick"
    assert said["tool_calls"][0]["function"]["arguments"] == '{"n": 3}'
    assert said["finish_reason"] == "tool_calls"
    parts = await deltas(site, **asked)
    assert parts[0]["delta"]["content"] == "the quick"
    assert "".join(part["delta"].get("content", "") for part in parts) == "the quick"
    assert any("tool_calls" in part["delta"] for part in parts)
    called = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "find", "arguments": "{}"}}]}  # fmt: skip
    said = await message(site, messages=[*BEGUN, called], tools=TOOLS, echo=True)
    assert said["content"] is None  # there is nothing to echo


async def test_log_probabilities_of_calls_in_streams(site: Site) -> None:
    """Every token has its own, in chunks that say nothing else where its text is held back."""
    parts = await deltas(site, tools=TOOLS, logprobs=True, return_token_ids=True)
    told = [len(part["logprobs"]["content"]) for part in parts if part["logprobs"]]
    assert sum(told) == sum(len(part["token_ids"]) for part in parts)


async def test_usage_in_every_chunk_beside_tools(site: Site) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = await site.chat(max_tokens=200, tools=TOOLS, stream=True, stream_options=options)
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == len(site.engine.tokens) + 1


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, "[find][sum]|<user>hello<assistant>the quick<go>"),
        ({"add_generation_prompt": False}, "[find][sum]|<user>hello<assistant>the quick"),
        ({"continue_final_message": True}, "[find][sum]|<user>hello<assistant>the quick"),
        ({"tool_choice": "none", "documents": [{"title": "t"}]}, "t|<user>hello<assistant>the quick<go>"),
        (
            {"messages": [
                {"role": "user", "content": "hello", "mood": "!"},
                {"role": "assistant", "tool_calls": [
                    {"id": "a", "function": {"name": "find", "arguments": '{"n": 3}'}}], "mood": "?"},
                {"role": "function", "name": "find", "content": "7"},
            ]},
            "[find][sum]|<user>hello!<assistant>?(find3)<tool>7<go>",
        ),
    ],
)  # fmt: skip
async def test_tools_in_prompts_that_are_rendered_in_other_ways(
    tmp_path: Path, fields: dict[str, Any], want: str
) -> None:
    async with site_of(tmp_path, trust_request_chat_template=True) as site:
        said = await message(site, **{"messages": BEGUN, "tools": TOOLS, "chat_template": SHOWS_ALL} | fields)
        assert site.prompts == [want]
        assert ("tool_calls" in said) is ("tool_choice" not in fields)


@pytest.mark.parametrize("detokenize", [True, False])
async def test_without_text_no_calls_are_told(site: Site, detokenize: bool) -> None:
    said = await message(site, tools=TOOLS, detokenize=detokenize)
    assert ("tool_calls" in said) is detokenize
    assert (said["content"] is None) is detokenize


@pytest.mark.parametrize(
    ("begun", "reasoning", "content"),
    [
        ("<think>Let me", " see", "yes"),
        ("<think>Let me</think>", None, " see</think>yes"),
        ("Let me", None, " see</think>yes"),
    ],
)
async def test_a_thought_that_is_continued(
    site: Site, begun: str, reasoning: str | None, content: str
) -> None:
    site.face.style = ChatStyle(STYLES["hermes"], thinks=True)
    site.say(" see</think>yes")
    messages = [BEGUN[0], {"role": "assistant", "content": begun}]
    said = await message(site, messages=messages, continue_final_message=True)
    assert (said.get("reasoning_content"), said["content"]) == (reasoning, content)


async def test_unknown_fields_are_ignored_beside_tools(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {"tools": TOOLS, "tool_choice": "required", "no_such_field": 1}
    async with site_of(tmp_path, unknown_fields="ignore") as site:
        with caplog.at_level(logging.WARNING):
            said = await message(site, **asked)
        assert said["tool_calls"][0]["function"]["name"] == "find"
        assert site.engine.requests[0].sampling.grammar is not None
        assert sum("no_such_field" in record.getMessage() for record in caplog.records) == 1
    async with site_of(tmp_path / "strict") as site:
        assert (await site.chat(**asked)).json()["error"]["param"] == "no_such_field"


async def test_salt_seed_and_words_beside_a_form(site: Site) -> None:
    await site.chat(regex="a+", cache_salt="s", allowed_token_ids=[5, 7], bad_words=["quick"], n=2)
    for request in site.engine.requests:
        assert request.cache_salt == "s"
        assert request.sampling.allowed_token_ids == (5, 7)
        assert request.sampling.bad_words
        assert request.sampling.grammar


async def test_the_fields_that_leave_no_token_are_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = site.engine._outputs

    def ends(request: Any, tokens: int = 0) -> Any:
        fields = "bad_words, the grammar"
        code = ErrorCode.NO_TOKEN_LEFT
        last = TokenOutput(request.request_id, [], finish_reason="error", error=code, message=fields)
        return [*outputs(request)[:tokens], last]

    monkeypatch.setattr(site.engine, "_outputs", ends)
    answer = await site.chat(regex="[^x]+", bad_words=["quick"])
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("bad_words", "no_token_left")
    assert error["message"] == "Nothing can come next: bad_words and the grammar leave no token."
    monkeypatch.setattr(site.engine, "_outputs", lambda request: ends(request, 2))
    parts = events((await site.chat(regex="[^x]+", bad_words=["quick"], stream=True)).text)
    assert parts[-1]["error"]["code"] == "no_token_left"
