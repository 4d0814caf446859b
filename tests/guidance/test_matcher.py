"""Grammars as matchers: what they allow, what they refuse, and how little a hostile one may take."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from server.errors import InvalidGrammar
from server.guidance import grammars
from server.guidance.matcher import Matcher, Vocabulary
from tests.text import tiny_tokenizer

SIZE = 310  # of the model's vocabulary: a little more than the tokenizer has


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.of(tiny_tokenizer.byte_level().to_str(), SIZE, [tiny_tokenizer.EOS])


def allowed(matcher: Matcher) -> set[int]:
    bits = np.frombuffer(matcher.allowed(), np.uint8)
    assert len(bits) == 4 * -(-SIZE // 32)
    return set(np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist())


def takes(vocabulary: Vocabulary, grammar: str, text: str) -> bool:
    """Whether the text may be all of an output. Every mask on the way must allow the token that comes."""
    matcher = vocabulary.compile(grammar)
    for token in tiny_tokenizer.byte_level().encode(text).ids:
        if token not in allowed(matcher):
            return False
        matcher.follow([token])
        assert matcher.error is None
    return tiny_tokenizer.EOS in allowed(matcher)


POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (grammars.of_schema(json.dumps(POINT)), '{"x": 1}', '{"y": 1}'),
        (grammars.of_schema(json.dumps(POINT)), '{\n  "x": 1\n}', '{"x":\n\n\n1}'),
        (grammars.of_schema(json.dumps(POINT), whitespace=""), '{"x":1}', '{"x": 1}'),
        (grammars.of_schema(json.dumps(POINT), whitespace="[ ]{3}"), '{   "x"   :   1   }', '{"x": 1}'),
        (grammars.of_schema(grammars.ANY_OBJECT), '{"a": [1, {"b": null}]}', "[1]"),
        (grammars.of_regex("[a-c]{2}-[0-9]+"), "ab-12", "ad-12"),
        (grammars.of_regex("^a|b$"), "b", "ab"),
        (grammars.of_choice(['say "yes"', "größe\n", "a|b"]), 'say "yes"', "größe"),
        (grammars.of_choice(['say "yes"', "größe\n", "a|b"]), "größe\n", "a"),
        (grammars.of_grammar('root ::= "x" [a-c]+ "!"'), "xabc!", "x!"),
        (grammars.of_grammar('start: "x" y\ny: "(" y ")" | "z"'), "x((z))", "x((z)"),
        (grammars.of_tags([("<f>", json.dumps(POINT), "</f>")], ["<f>"]), 'hi <f>{"x": 2}</f>', "<f>{}</f>"),
        (grammars.of_tags([("<f>", json.dumps(POINT), "</f>")], ["<"]), "no tag", "<g>"),
    ],
)
def test_what_is_allowed(vocabulary: Vocabulary, grammar: str, right: str, wrong: str) -> None:
    vocabulary.judge(grammar)
    assert takes(vocabulary, grammar, right)
    assert not takes(vocabulary, grammar, wrong)


def test_the_end_may_come_only_where_the_grammar_may_end(vocabulary: Vocabulary) -> None:
    matcher = vocabulary.compile(grammars.of_regex("ab?"))
    (a,), (b,) = (tiny_tokenizer.byte_level().encode(text).ids for text in "ab")
    assert tiny_tokenizer.EOS not in allowed(matcher)
    matcher.follow([a])
    assert allowed(matcher) == {b, tiny_tokenizer.EOS}
    assert not matcher.complete
    matcher.follow([b])
    assert allowed(matcher) == {tiny_tokenizer.EOS}
    assert matcher.complete


def test_a_copy_goes_its_own_way(vocabulary: Vocabulary) -> None:
    first = vocabulary.compile(grammars.of_choice(["ab", "cd"]))
    (a,), (c,) = (tiny_tokenizer.byte_level().encode(text).ids for text in "ac")
    other = first.copy()
    other.follow([c])
    assert {a, c} <= allowed(first)
    first.follow([a])
    assert allowed(first) != allowed(other)
    assert first.copy().followed == 1


def test_a_token_that_is_not_allowed_is_an_error(vocabulary: Vocabulary) -> None:
    matcher = vocabulary.compile(grammars.of_regex("a"))
    matcher.follow(tiny_tokenizer.byte_level().encode("b").ids)
    assert matcher.error


def schema(value: Any) -> str:
    return grammars.of_schema(json.dumps(value))


@pytest.mark.parametrize(
    "grammar",
    [
        grammars.of_regex("(("),
        grammars.of_regex("a(?=b)"),
        schema({"type": "strin"}),
        schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
        schema({"$ref": "http://127.0.0.1/x"}),
        schema({"type": "integer", "minimum": 3, "maximum": 2}),
        grammars.of_grammar("start: nowhere"),
        '{"grammars": 1}',
    ],
)
def test_what_is_no_grammar_or_matches_nothing(vocabulary: Vocabulary, grammar: str) -> None:
    with pytest.raises(InvalidGrammar) as refused:
        vocabulary.judge(grammar)
    assert 0 < len(refused.value.message) <= 300
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("make", [grammars.of_schema, grammars.of_grammar])
def test_text_that_is_not_even_one(make: Any, vocabulary: Vocabulary) -> None:
    with pytest.raises(InvalidGrammar):
        vocabulary.judge(make("{"))


def test_a_tag_needs_a_trigger() -> None:
    with pytest.raises(InvalidGrammar, match="no trigger begins '<f>'"):
        grammars.of_tags([("<f>", "true", "")], ["[f]"])


def _twice(levels: int) -> dict[str, Any]:
    """A schema that doubles with each level."""
    levels_of = {}
    for i in range(levels):
        below = {"$ref": f"#/$defs/l{i + 1}"}
        either = {"anyOf": [below, {"type": "object", "properties": {f"k{i}": below}}]}
        levels_of[f"l{i}"] = {"allOf": [either, below]}
    return {"$ref": "#/$defs/l0", "$defs": levels_of | {f"l{levels}": {"type": "object"}}}


@pytest.mark.parametrize(
    "bomb",
    [
        grammars.of_regex("(((a{1000}){1000}){1000})"),
        grammars.of_regex("a{1000000}"),
        schema(_twice(25)),
        schema({"anyOf": [{"type": "object", "properties": {f"b{i}": {}}} for i in range(1000)]}),
    ],
    ids=["repeats", "long", "doubling", "alternatives"],
)
def test_bombs_meet_a_limit(vocabulary: Vocabulary, bomb: str) -> None:
    started = time.process_time()
    with pytest.raises(InvalidGrammar):
        vocabulary.judge(bomb)
    assert time.process_time() - started < 10  # without limits 5 s for one token, and far more for others


def test_a_recursive_schema_is_no_bomb(vocabulary: Vocabulary) -> None:
    tree = {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}}
    assert takes(vocabulary, schema(tree), "[[], [[]]]")


def test_a_model_that_no_text_can_be_guided_of() -> None:
    with pytest.raises(InvalidGrammar, match="end-of-sequence"):
        Vocabulary.of(tiny_tokenizer.byte_level().to_str(), SIZE, [])
    with pytest.raises(InvalidGrammar, match="tokenizer cannot be guided"):
        Vocabulary.of("{}", SIZE, [1])
