"""The fields that hold an output to a form: OpenAI's `response_format`, and vLLM's and SGLang's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from server.api.inference.strict import Strict
from server.errors import InvalidRequest
from server.guidance import grammars

MAX_ALTERNATIVES = 1024
MAX_PATTERN_CHARACTERS = 16_384

Schema = dict[str, Any] | bool


def _schema_or_text(value: object) -> object:
    if not isinstance(value, dict | str):
        raise ValueError("must be a JSON schema, as an object or as text")
    return value


_SchemaOrText = Annotated[Any, PlainValidator(_schema_or_text, json_schema_input_type=dict[str, Any] | str)]
_Pattern = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN_CHARACTERS)]
_Alternatives = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(min_length=1, max_length=MAX_ALTERNATIVES, fail_fast=True),
]


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


_Structures = Annotated[list[Structure], Field(min_length=1, max_length=128, fail_fast=True)]
_Triggers = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=128)]


class StructuralTag(Strict):
    """Free text in which tags hold what their schemas allow, as vLLM and SGLang have it."""

    type: Literal["structural_tag"] = "structural_tag"
    structures: _Structures
    triggers: _Triggers


def _of_text(value: object) -> object:
    """vLLM takes some objects as JSON text too."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {str(error)[:100]}") from error


_Tag = Annotated[StructuralTag, BeforeValidator(_of_text, json_schema_input_type=StructuralTag | str)]


class ResponseFormat(Strict):
    """OpenAI's, with vLLM's and SGLang's tags."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: NamedSchema | None = None
    structures: _Structures | None = None
    triggers: _Triggers | None = None

    @model_validator(mode="after")
    def _has_what_it_names(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: goes with the type json_schema")
        if (self.type == "structural_tag") != (None not in (self.structures, self.triggers)):
            raise ValueError("structures, triggers: go with the type structural_tag")
        return self


class StructuredOutputs(Strict):
    """vLLM's: one of these, and how JSON is spaced."""

    json_: Annotated[_SchemaOrText | None, Field(alias="json")] = None
    regex: _Pattern | None = None
    choice: _Alternatives | None = None
    grammar: _Pattern | None = None
    json_object: bool | None = None
    structural_tag: _Tag | None = None
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
    if wanted is None:
        return
    if wanted.type == "json_object":
        yield Guide("response_format", partial(grammars.of_schema, grammars.ANY_OBJECT))
    if wanted.json_schema is not None:
        schema = json.dumps(wanted.json_schema.schema_)
        yield Guide("response_format", partial(grammars.of_schema, schema))
    if wanted.structures is not None and wanted.triggers is not None:
        yield Guide("response_format", partial(_tags, wanted.structures, wanted.triggers))


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
        of_fields["structural_tag"] = partial(
            _tags, wanted.structural_tag.structures, wanted.structural_tag.triggers
        )
    for name, grammar in of_fields.items():
        yield Guide(f"structured_outputs.{name}", grammar)


def _json(schema: dict[str, Any] | str, whitespace: str | None) -> str:
    return grammars.of_schema(schema if isinstance(schema, str) else json.dumps(schema), whitespace)


def _tags(structures: list[Structure], triggers: list[str]) -> str:
    return grammars.of_tags([(tag.begin, json.dumps(tag.schema_), tag.end) for tag in structures], triggers)
