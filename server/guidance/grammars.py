"""What clients say an output must be, as grammars that llguidance reads. Nothing here is compiled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llguidance import LLMatcher, StructTag, grammar_from

from server.errors import InvalidGrammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # there for type checkers alone

# A line end with what indents the next line, or one space. llguidance's own allows any amount, and small
# models that do not know how to go on then write spaces until they are cut off.
_WHITESPACE = r"(\n[ \t]{0,40}| )"

ANY_OBJECT = '{"type": "object"}'


def of_schema(schema: str, whitespace: str | None = None) -> str:
    """JSON that a JSON schema, itself JSON, allows. `whitespace`: a regex of what may stand between its
    parts, empty for nothing. Raises InvalidGrammar for what is no JSON."""
    overrides: JsonCompileOptions = {}
    if whitespace is not None:
        overrides = {"whitespace_pattern": whitespace} if whitespace else {"whitespace_flexible": False}
    defaults: JsonCompileOptions = {} if whitespace == "" else {"whitespace_pattern": _WHITESPACE}
    try:
        return LLMatcher.grammar_from_json_schema(schema, defaults, overrides)
    except ValueError as error:
        raise InvalidGrammar(f"not a JSON schema: {str(error)[:200]}") from error


def of_regex(regex: str) -> str:
    """What a regular expression (Rust's syntax) matches as a whole."""
    return LLMatcher.grammar_from_regex(regex)


def of_choice(choices: Sequence[str]) -> str:
    """One of these texts."""
    return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, choices)))


def of_grammar(text: str) -> str:
    """A context-free grammar: Lark as llguidance has it, or GBNF. Raises InvalidGrammar."""
    try:
        return grammar_from("grammar", text)
    except Exception as error:  # the conversion raises whatever it meets
        raise InvalidGrammar(f"not a grammar: {str(error)[:200]}") from error


def of_tags(tags: Sequence[tuple[str, str, str]], triggers: Sequence[str]) -> str:
    """Free text in which what follows the beginning of a tag must match its schema, up to its end. Tags are
    (begin, schema as JSON, end); the free text ends where a trigger stands. Raises InvalidGrammar."""
    structures = []
    for begin, schema, end in tags:
        trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
        if not trigger:
            raise InvalidGrammar(f"no trigger begins {begin[:100]!r}")
        structures.append(StructTag(trigger=trigger, begin=begin, grammar=schema, end=end))
    return StructTag.to_grammar(structures, assume_special=False)


def of_calls(tools: Sequence[tuple[str, str]], arguments: str, *, begin: str, end: str, many: bool) -> str:
    """Calls of tools, (name, schema of its arguments as JSON), each between `begin` and `end`: one, or where
    `many` one or more. `arguments`: the key that a call has them under. Without a begin several are a list.
    """
    calls = []
    rules = [f"call: {' | '.join(f'call_{at}' for at in range(len(tools)))}"]
    for at, (name, schema) in enumerate(tools):
        head = json.dumps(f'{{"name": {json.dumps(name)}, "{arguments}": ')
        calls.append(f'call_{at}: {head} arguments_{at} "}}"\narguments_{at}: %json {_spaced(schema)}')
    one = f"{json.dumps(begin)} call {json.dumps(end)}" if begin else "call"
    if not many:
        start = one
    elif begin:
        start = f'{one} ("\\n" {one})*'
    else:
        start = f'{one} | "[" {one} (", " {one})* "]"'
    return LLMatcher.grammar_from_lark("\n".join([f"start: {start}", *rules, *calls]))


def _spaced(schema: str) -> str:
    """With the white space of `of_schema`."""
    fields = json.loads(schema)
    if not isinstance(fields, dict):
        return schema
    return json.dumps({"x-guidance": {"whitespace_pattern": _WHITESPACE}} | fields)
