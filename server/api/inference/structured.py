"""The fields that hold an output to a form: OpenAI's `response_format`, and vLLM's and SGLang's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from server.api.inference.strict import Strict
from server.errors import InvalidGrammar, InvalidRequest
from server.guidance import grammars

MAX_ALTERNATIVES = 1024
MAX_PATTERN_CHARACTERS = 16_384

Schema = dict[str, Any] | bool
_Pattern = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN_CHARACTERS)]
_Alternatives = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(min_length=1, max_length=MAX_ALTERNATIVES, fail_fast=True),
]
_SchemaOrText = dict[str, Any] | str


class NamedSchema(Strict):
    """`json_schema` of OpenAI's `response_format`. All are strict here: `strict` changes nothing."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")] = True
    strict: bool | None = None


class Structure(Strict):
    """A tag in a text, and what stands in it."""

    begin: Annotated[str, Field(min_length=1)]
    schema_: Annotated[Schema, Field(alias="schema")] = True
    end: str = ""


class StructuralTag(Strict):
    """Free text in which tags hold what their schemas allow, as vLLM and SGLang have it."""

    type: Literal["structural_tag"] = "structural_tag"
    structures: Annotated[list[Structure], Field(min_length=1, max_length=128, fail_fast=True)]
    triggers: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=128)]

    def grammar(self) -> str:
        tags = [(tag.begin, json.dumps(tag.schema_), tag.end) for tag in self.structures]
        return grammars.of_tags(tags, self.triggers)


class TextFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    type: Literal["json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    TextFormat | ObjectFormat | SchemaFormat | StructuralTag, Field(discriminator="type")
]


class StructuredOutputs(Strict):
    """vLLM's: one of these, and how JSON is spaced."""

    json_: Annotated[_SchemaOrText | None, Field(alias="json")] = None
    regex: _Pattern | None = None
    choice: _Alternatives | None = None
    grammar: _Pattern | None = None
    json_object: bool | None = None
    structural_tag: StructuralTag | str | None = None
    whitespace_pattern: _Pattern | None = None
    disable_any_whitespace: bool = False
    disable_fallback: bool = False  # no effect: there is one way
    disable_additional_properties: bool = False  # no effect: a schema says it


class Guided(Strict):
    """A request whose output can be held to a form."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: _SchemaOrText | None = None
    guided_regex: _Pattern | None = None
    guided_choice: _Alternatives | None = None
    guided_grammar: _Pattern | None = None
    guided_whitespace_pattern: _Pattern | None = None
    guided_decoding_backend: str | None = None  # no effect: there is one
    json_schema: str | None = None
    regex: _Pattern | None = None
    ebnf: _Pattern | None = None


GUIDED_FIELDS = frozenset(Guided.model_fields)


@dataclass(frozen=True)
class Guide:
    """What an output is held to, and by which field."""

    field: str
    grammar: Callable[[], str]  # raises InvalidGrammar


def guide_of(request: Guided) -> Guide | None:
    """The one that a request asks for. Raises InvalidRequest where there are several."""
    guides = list(_guides(request))
    if len(guides) > 1:
        first, second = guides[0].field, guides[1].field
        raise InvalidRequest(f"{second}: not together with {first}", param=second)
    return guides[0] if guides else None


def _guides(request: Guided) -> Iterator[Guide]:
    whitespace = request.guided_whitespace_pattern
    yield from _of_response_format(request.response_format)
    if request.structured_outputs is not None:
        yield from _of_structured_outputs(request.structured_outputs)
    if request.guided_json is not None:
        yield Guide("guided_json", partial(_json, request.guided_json, whitespace))
    if request.json_schema is not None:
        yield Guide("json_schema", partial(_json, request.json_schema, whitespace))
    if request.guided_choice is not None:
        yield Guide("guided_choice", partial(grammars.of_choice, request.guided_choice))
    for field in ("guided_regex", "regex"):
        if (regex := getattr(request, field)) is not None:
            yield Guide(field, partial(grammars.of_regex, regex))
    for field in ("guided_grammar", "ebnf"):
        if (grammar := getattr(request, field)) is not None:
            yield Guide(field, partial(grammars.of_grammar, grammar))


def _of_response_format(wanted: ResponseFormat | None) -> Iterator[Guide]:
    match wanted:
        case ObjectFormat():
            yield Guide("response_format", partial(grammars.of_schema, grammars.ANY_OBJECT))
        case SchemaFormat():
            schema = json.dumps(wanted.json_schema.schema_)
            yield Guide("response_format", partial(grammars.of_schema, schema))
        case StructuralTag():
            yield Guide("response_format", wanted.grammar)


def _of_structured_outputs(wanted: StructuredOutputs) -> Iterator[Guide]:
    whitespace = "" if wanted.disable_any_whitespace else wanted.whitespace_pattern
    of_fields: dict[str, Callable[[], str]] = {}
    if wanted.json_ is not None:
        of_fields["json"] = partial(_json, wanted.json_, whitespace)
    if wanted.json_object:
        of_fields["json_object"] = partial(grammars.of_schema, grammars.ANY_OBJECT, whitespace)
    if wanted.regex is not None:
        of_fields["regex"] = partial(grammars.of_regex, wanted.regex)
    if wanted.choice is not None:
        of_fields["choice"] = partial(grammars.of_choice, wanted.choice)
    if wanted.grammar is not None:
        of_fields["grammar"] = partial(grammars.of_grammar, wanted.grammar)
    if wanted.structural_tag is not None:
        of_fields["structural_tag"] = partial(_tags, wanted.structural_tag)
    for name, grammar in of_fields.items():
        yield Guide(f"structured_outputs.{name}", grammar)


def _json(schema: _SchemaOrText, whitespace: str | None) -> str:
    return grammars.of_schema(schema if isinstance(schema, str) else json.dumps(schema), whitespace)


def _tags(tag: StructuralTag | str) -> str:
    """vLLM takes it as JSON text too. Raises InvalidGrammar for a text that is none."""
    if isinstance(tag, StructuralTag):
        return tag.grammar()
    try:
        return StructuralTag.model_validate_json(tag).grammar()
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise InvalidGrammar(f"not a structural tag: {where}: {fault['msg']}") from error
