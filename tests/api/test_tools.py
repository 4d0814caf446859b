"""Tools and reasoning in chats, with an engine that says what a model would."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageFunctionToolCall

from server.api.inference.chat_text import ChatStyle
from server.guidance.matcher import Vocabulary
from server.text.tool_calls import STYLES
from tests.api.face_site import Site, listen, open_site
from tests.text import tiny_tokenizer

FIND: dict[str, Any] = {
    "name": "find", "description": "Look.",
    "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
                   "additionalProperties": False},
}  # fmt: skip
SUM: dict[str, Any] = {"name": "sum"}
TOOLS = [{"type": "function", "function": FIND}, {"type": "function", "function": SUM}]
CALL = '<tool_call>\n{"name": "find", "arguments": {"n": 3}}\n</tool_call>'


@asynccontextmanager
async def site_of(tmp_path: Path, **fields: Any) -> AsyncIterator[Site]:
    async with open_site(tmp_path, **{"tool_parser": "hermes"} | fields) as site:
        site.engine._info = site.engine.info = type(site.engine.info)(  # type: ignore[misc,union-attr]
            **{name: getattr(site.engine.info, name) for name in site.engine.info.__struct_fields__}  # type: ignore[union-attr]
            | {"max_model_len": 1000}
        )
        site.say(CALL)
        yield site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with site_of(tmp_path) as site:
        yield site


async def message(site: Site, **fields: Any) -> dict[str, Any]:
    answer = await site.chat(max_tokens=200, **fields)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice["message"] | {"finish_reason": choice["finish_reason"]}


async def deltas(site: Site, **fields: Any) -> list[dict[str, Any]]:
    answer = await site.chat(max_tokens=200, stream=True, **fields)
    assert answer.status_code == 200, answer.text
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    return [json.loads(event)["choices"][0] for event in events]


async def test_a_call_is_told_as_one(site: Site) -> None:
    said = await message(site, tools=TOOLS)
    (call,) = said["tool_calls"]
    assert call["function"] == {"name": "find", "arguments": '{"n": 3}'}
    assert (call["type"], said["content"], said["finish_reason"]) == ("function", None, "tool_calls")
    assert call["id"].startswith("call_")
    assert site.engine.requests[0].sampling.grammar is None


async def test_a_stream_tells_the_same_in_parts(site: Site) -> None:
    site.say("Wait." + CALL + CALL)
    parts = await deltas(site, tools=TOOLS)
    assert parts[0]["delta"]["role"] == "assistant"
    assert "".join(part["delta"].get("content", "") for part in parts) == "Wait."
    calls = [call for part in parts for call in part["delta"].get("tool_calls", [])]
    for index in (0, 1):
        first, *others = [call for call in calls if call["index"] == index]
        assert first["id"]
        assert first["function"] == {"name": "find", "arguments": ""}
        assert "".join(call["function"]["arguments"] for call in others) == '{"n": 3}'
        assert len(others) > 2
        assert all("id" not in call and "name" not in call["function"] for call in others)
    assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["tool_calls"]


async def test_without_tools_a_text_stays_what_it_is(site: Site) -> None:
    for fields in ({}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}):
        said = await message(site, **fields)
        assert (said["content"], said["finish_reason"]) == (CALL, "stop")
        assert "tool_calls" not in said


async def test_one_call_where_only_one_is_wanted(site: Site) -> None:
    site.say(CALL + "\n" + CALL)
    assert len((await message(site, tools=TOOLS))["tool_calls"]) == 2
    assert len((await message(site, tools=TOOLS, parallel_tool_calls=False))["tool_calls"]) == 1


async def test_the_first_names_of_tools(site: Site) -> None:
    said = await message(site, functions=[FIND, SUM], function_call={"name": "find"})
    assert said["function_call"] == {"name": "find", "arguments": '{"n": 3}'}
    assert said["finish_reason"] == "function_call"
    parts = [part["delta"].get("function_call", {}) for part in await deltas(site, functions=[FIND])]
    assert "".join(part.get("arguments", "") for part in parts) == '{"n": 3}'


def matches(grammar: str, text: str) -> bool:
    vocabulary = Vocabulary.of(tiny_tokenizer.byte_level().to_str(), 310, [tiny_tokenizer.EOS])
    matcher = vocabulary.compile(grammar)
    matcher.follow(tiny_tokenizer.byte_level().encode(text).ids)
    return matcher.error is None and matcher._matcher.is_accepting()


ANY = '{"name": "sum", "arguments": {"any": [1]}}'


@pytest.mark.parametrize(
    ("choice", "right", "wrong"),
    [
        ("required", [CALL, f"<tool_call>\n{ANY}\n</tool_call>", CALL + "\n" + CALL], ["text", ""]),
        ({"type": "function", "function": {"name": "find"}}, [CALL], [f"<tool_call>\n{ANY}\n</tool_call>"]),
        ("required", [], [CALL.replace("3", '"x"'), CALL.replace("find", "other")]),
    ],
)
async def test_forced_calls_are_held_to_their_schema(
    site: Site, choice: Any, right: list[str], wrong: list[str]
) -> None:
    await message(site, tools=TOOLS, tool_choice=choice)
    grammar = site.engine.requests[0].sampling.grammar
    assert grammar is not None
    assert all(matches(grammar, text) for text in right)
    assert not any(matches(grammar, text) for text in wrong)


@pytest.mark.parametrize("style", ["llama3", "mistral", "json"])
async def test_forced_calls_of_styles_without_marks_that_are_text(tmp_path: Path, style: str) -> None:
    async with site_of(tmp_path, tool_parser=style) as site:
        key = STYLES[style].arguments
        call = f'{{"name": "find", "{key}": {{"n": 3}}}}'
        site.say(f"[{call}, {call}]")
        said = await message(site, tools=TOOLS, tool_choice="required")
        grammar = site.engine.requests[0].sampling.grammar
        assert grammar is not None
        assert matches(grammar, call)
        assert matches(grammar, f"[{call}, {call}]")
        assert [each["function"]["arguments"] for each in said["tool_calls"]] == ['{"n": 3}'] * 2
        assert len(said["tool_calls"][0]["id"]) == (9 if style == "mistral" else 29)


async def test_calls_of_before_reach_the_template(site: Site) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"n": 3}'}}
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "seven"},
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "function", "name": "find", "content": "eight"},
        {"role": "assistant", "function_call": {"name": "find", "arguments": "{"}},
    ]
    await message(site, messages=messages)
    prompt = tiny_tokenizer.byte_level().decode(
        site.engine.requests[0].prompt_token_ids, skip_special_tokens=False
    )
    for part in ("<|assistant|></s>", "<|tool|>seven", "<|assistant|>no", "<|tool|>eight"):
        assert part in prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ({"functions": [FIND], "function_call": {"name": "no"}}, "function_call"),
        ({"functions": [FIND], "tools": TOOLS}, "functions"),
        ({"tools": TOOLS * 65}, "tools"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "x"}}}],
          "tool_choice": "required"}, "tools"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "a",
          "arguments": ""}}]}]}, "messages[0].tool_calls"),
    ],
)  # fmt: skip
async def test_what_cannot_be_offered(site: Site, fields: dict[str, Any], param: str) -> None:
    answer = await site.chat(**fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


async def test_a_template_that_shows_no_tools_is_told(tmp_path: Path) -> None:
    async with site_of(tmp_path, tool_parser="auto") as site:
        answer = await site.chat(tools=TOOLS)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
        assert (await site.chat(tools=TOOLS, tool_choice="none")).status_code == 200


async def test_reasoning_is_parted_from_the_answer(site: Site) -> None:
    site.face.style = ChatStyle(STYLES["hermes"], thinks=True)
    site.say("<think>hm</think>" + CALL)
    said = await message(site, tools=TOOLS)
    assert said["reasoning_content"] == said["reasoning"] == "hm"
    assert said["tool_calls"][0]["function"]["name"] == "find"
    parts = [part["delta"] for part in await deltas(site)]
    assert "".join(part.get("reasoning_content", "") for part in parts) == "hm"
    assert "".join(part.get("content", "") for part in parts) == CALL


async def test_the_sdk_reads_calls(site: Site) -> None:
    async with (
        listen(site.app) as url,
        openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
        ) as client,
    ):
        answer = await client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "hello"}], tools=TOOLS, max_tokens=200
        )  # type: ignore[call-overload]  # the tools are plain objects
        (call,) = answer.choices[0].message.tool_calls
        assert isinstance(call, ChatCompletionMessageFunctionToolCall)
        assert json.loads(call.function.arguments) == {"n": 3}
