"""Fields that hold an output to a form, each as the engine is asked for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from server.guidance.matcher import Vocabulary
from tests.api.face_site import Site, open_site
from tests.api.fake_engine import VOCABULARY

SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
CLOSED = SCHEMA | {"additionalProperties": False}
TAG = {"structures": [{"begin": "<n>", "schema": {"enum": [1]}, "end": "</n>"}], "triggers": ["<n>"]}

# Each with a text that is right and one that is not.
FORMS: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_object"}}, '{"a": [1]}', "[1]"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": CLOSED}}},
        '{"n": 2}',
        '{"n": 3}',
    ),
    ({"response_format": TAG | {"type": "structural_tag"}}, "so <n>1</n> it is", "so <n>2</n>"),
    ({"structured_outputs": {"json": CLOSED}}, '{"n":1}', '{"m":1}'),
    ({"structured_outputs": {"json_object": True}}, "{}", "1"),
    ({"structured_outputs": {"regex": "a+b"}}, "aab", "ba"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "no", "maybe"),
    ({"structured_outputs": {"grammar": 'root ::= "x" | "y"'}}, "y", "z"),
    ({"structured_outputs": {"structural_tag": TAG}}, "<n>1</n>", "<n>x"),
    ({"structured_outputs": {"json": CLOSED, "disable_any_whitespace": True}}, '{"n":1}', '{"n": 1}'),
    ({"guided_json": CLOSED, "guided_whitespace_pattern": "_*"}, '{"n":_1}', '{"n": 1}'),
    ({"guided_json": CLOSED}, '{"n": 1}', '{"n": 0}'),
    ({"guided_regex": "[0-9]{3}"}, "123", "12a"),
    ({"guided_choice": ["red", "green"], "guided_decoding_backend": "auto"}, "green", "blue"),
    ({"guided_grammar": 'start: "a" "b"'}, "ab", "aa"),
    ({"json_schema": '{"type": "integer"}'}, "12", '"x"'),
    ({"regex": "x|y"}, "x", "w"),
    ({"ebnf": 'root ::= "a"+'}, "aaa", "b"),
]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        site.say("the quick brown fox")
        yield site


def matches(site: Site, grammar: str, text: str) -> bool:
    """Whether a grammar lets each token of a text come, and then the end."""
    tokenizer = site.face.tokenizer
    assert tokenizer is not None
    matcher = Vocabulary.of(tokenizer.to_json(), VOCABULARY, [1]).compile(grammar)
    matcher.follow(tokenizer.encode_chat(text))
    return matcher.error is None and bool(matcher.allowed()[0] & 0b10)


@pytest.mark.parametrize(("fields", "right", "wrong"), FORMS, ids=lambda value: str(value)[:50])
async def test_every_field_that_holds_an_output_to_a_form(
    site: Site, fields: dict[str, Any], right: str, wrong: str
) -> None:
    for response in (await site.complete(**fields), await site.chat(**fields)):
        assert response.status_code == 200, response.text
    for request in site.engine.requests:
        grammar = request.sampling.grammar
        assert grammar is not None
        assert matches(site, grammar, right)
        assert not matches(site, grammar, wrong)


@pytest.mark.parametrize("nothing", [None, {"type": "text"}])
async def test_a_form_that_is_none(site: Site, nothing: Any) -> None:
    assert (await site.chat(response_format=nothing)).status_code == 200
    assert site.engine.requests[0].sampling.grammar is None
