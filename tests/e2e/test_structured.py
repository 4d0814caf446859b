"""Outputs held to forms, and calls of tools, through the running server: right answers, beside free ones."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import pytest

from examples import tasks
from tests.e2e.server import Server

SEED = 20_261_128
FIELDS = {"who": "string", "action": "string", "count": "integer", "item": "string", "city": "string"}
RECORD = {
    "type": "object",
    "properties": {name: {"type": kind} for name, kind in (FIELDS | {"day": "string"}).items()},
    "required": list(FIELDS),
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "record", "parameters": RECORD}}


async def chats(server: Server, asks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All at once, so that they share batches: the first choice of each."""
    async with httpx.AsyncClient(base_url=server.url, timeout=240) as http:

        async def one(fields: dict[str, Any]) -> dict[str, Any]:
            body = {"temperature": 0, "max_tokens": 80} | fields
            answer = await http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            choice: dict[str, Any] = answer.json()["choices"][0]
            return choice

        return await asyncio.gather(*map(one, asks))


def ask(model: str, prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": prompt}]} | fields


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


async def test_adapters_give_their_right_answers_in_the_form_that_fits_them(bundled: Server) -> None:
    forms: dict[str, dict[str, Any]] = {
        "json": {"response_format": schema_format(RECORD)},
        "sentiment": {"guided_choice": ["positive", "negative", "neutral"]},
        "sql": {"structured_outputs": {"regex": "SELECT [^;]+;"}},
        "sort": {"ebnf": 'root ::= [0-9] (", " [0-9])*'},
        "upper": {},  # free, in the same batch
    }
    examples = {name: tasks.JOBS[name].examples("heldout", 6, SEED) for name in forms}
    asks = [ask(name, examples[name][i].prompt, **forms[name]) for i in range(6) for name in forms]
    got = await chats(bundled, asks)
    right = [examples[name][i].completion for i in range(6) for name in forms]
    answers = [choice["message"]["content"] for choice in got]
    assert sum(a == b for a, b in zip(answers, right, strict=True)) >= 27, answers


async def test_any_model_is_held_to_any_form(bundled: Server) -> None:
    shape = {"type": "object", "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2]}},
             "required": ["ok", "n"], "additionalProperties": False}  # fmt: skip
    models = ["upper", "json", "chorus-tiny", "esperanto"]
    asks = [
        ask(name, "Hello", response_format=schema_format(shape), temperature=1, seed=1) for name in models
    ]
    asks += [ask(name, "Hello", guided_regex="[a-f]{5}", temperature=1, seed=1) for name in models]
    got = await chats(bundled, asks)
    for choice in got[: len(models)]:
        said = json.loads(choice["message"]["content"])
        assert said.keys() == {"ok", "n"}
        assert said["n"] in (1, 2)
    assert all(re.fullmatch("[a-f]{5}", choice["message"]["content"]) for choice in got[len(models) :])
    assert {choice["finish_reason"] for choice in got} == {"stop"}


async def test_a_forced_call_is_one_whatever_the_model_knows(bundled: Server) -> None:
    small = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
             "additionalProperties": False}  # fmt: skip
    tool = {"type": "function", "function": {"name": "go", "parameters": small}}
    (choice,) = await chats(
        bundled,
        [
            ask(
                "upper",
                "Oslo",
                tools=[TOOL, tool],
                tool_choice={"type": "function", "function": {"name": "go"}},
            )
        ],
    )
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == "go"
    assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")


@pytest.mark.parametrize("field", ["guided_regex", "guided_json"])
async def test_a_bomb_is_refused_and_free_requests_go_on(bundled: Server, field: str) -> None:
    properties = {f"p{i}": {"type": "string"} for i in range(2000)}
    bomb = {
        "guided_regex": "(((a{1000}){1000}){1000})",
        "guided_json": {"type": "object", "properties": properties},
    }[field]
    async with httpx.AsyncClient(base_url=bundled.url, timeout=240) as http:
        bombs = [http.post("/v1/chat/completions", json=ask("json", "x", **{field: bomb})) for _ in range(3)]
        example = tasks.JOBS["upper"].examples("heldout", 1, SEED)[0]
        refused, free = await asyncio.gather(
            asyncio.gather(*bombs), chats(bundled, [ask("upper", example.prompt)] * 4)
        )
    assert {(answer.status_code, answer.json()["error"]["param"]) for answer in refused} == {(400, field)}
    assert {choice["message"]["content"] for choice in free} == {example.completion}
