"""JSON bodies to the types of schemas.py. Every refusal is an InvalidRequest that names the field."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
import pydantic
import pydantic_core

from server.api.inference.chat_messages import MAX_MESSAGES
from server.api.inference.field_lists import asks_for_nothing, is_neutral
from server.api.inference.schemas import (
    IGNORED_FIELDS,
    MAX_PROMPTS,
    MOST_TRUNCATED,
    NEUTRAL_FIELDS,
    GenerationRequest,
)
from server.api.inference.strict import Strict
from server.errors import InvalidRequest

_LARGE = 16 * 2**10  # bytes; a body above this is looked at with care
_MOST_BESIDE = 128 * 2**10  # bytes; all fields but the prompt

Body = TypeVar("Body", bound=Strict)


def parse(kind: type[Body], body: bytes, longest: int, ignored: list[str] | None = None) -> Body:
    """A JSON body as one of the types above. `longest`: most tokens that one prompt can have. `ignored` takes
    the names of unknown fields; without it they are refused.

    Bodies too large for what they could mean are refused before the parser makes objects of them.
    """
    if len(body) > _LARGE:
        _judge_size(body, longest)
    try:
        fields = pydantic_core.from_json(body)  # takes NaN and Infinity, so that a field can be named
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(fields, dict):
        raise InvalidRequest("The body must be a JSON object.")
    _refuse_unsupported(fields, kind)
    _judge_unknown(fields, kind, ignored)
    try:
        request = kind.model_validate(fields)
    except pydantic.ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_context=False)) from None
    return request


class _LargeFields(msgspec.Struct):
    prompt: msgspec.Raw = msgspec.Raw(b"null")
    messages: msgspec.Raw = msgspec.Raw(b"null")
    tokens: msgspec.Raw = msgspec.Raw(b"null")


class _MessageShape(msgspec.Struct):
    """As `Message`, for a decoder that ends at the first fault."""

    role: str
    content: str | list[_PartShape] | None = None
    name: str | None = None
    refusal: str | None = None
    audio: None = None
    function_call: _CalledShape | None = None
    tool_calls: list[_CallShape] | None = None
    tool_call_id: str | None = None
    annotations: _Empty | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _CalledShape(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str


class _CallShape(msgspec.Struct, forbid_unknown_fields=True):
    function: _CalledShape
    id: str | None = None
    type: str = "function"
    index: int | None = None


class _PartShape(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


_Empty = Annotated[list[None], msgspec.Meta(max_length=0)]


_FIELDS = msgspec.json.Decoder(_LargeFields)
_STRINGS = msgspec.json.Decoder(list[str])
_MESSAGES = msgspec.json.Decoder(list[_MessageShape] | None)


def _judge_size(body: bytes, longest: int) -> None:
    """Refuses a large body that cannot be right, in a few milliseconds for 8 MiB and without objects."""
    try:
        fields = _FIELDS.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {str(error)[:200]}") from error
    large = sum(len(bytes(raw)) for raw in (fields.prompt, fields.messages, fields.tokens))
    if len(body) - large > _MOST_BESIDE:
        raise InvalidRequest(f"The fields beside the prompt are larger than {_MOST_BESIDE} bytes.")
    for name in ("prompt", "tokens"):
        _judge_prompt(name, bytes(getattr(fields, name)), longest)
    try:
        messages = _MESSAGES.decode(fields.messages)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRequest(f"messages: {str(error)[:200]}", param="messages") from error
    if messages and len(messages) > MAX_MESSAGES:
        raise InvalidRequest(
            f"messages: {len(messages)} messages, the limit is {MAX_MESSAGES}", param="messages"
        )


def _judge_prompt(name: str, raw: bytes, longest: int) -> None:
    if not raw.startswith(b"["):
        return  # one string
    if raw[1:].lstrip().startswith(b'"'):
        try:
            prompts = len(_STRINGS.decode(raw))  # ends at the first thing that is not a string
        except msgspec.MsgspecError as error:
            raise InvalidRequest(f"{name}: {error}", param=name) from error
    elif b'"' in raw:
        raise InvalidRequest(f"{name}: strings and other things are mixed", param=name)
    else:  # only numbers, commas and brackets are right here
        prompts = max(raw.count(b"[") - 1, 1)
        if raw.count(b",") >= MOST_TRUNCATED * longest * prompts + prompts:
            raise InvalidRequest(
                f"{name}: far longer than the context of {longest} tokens",
                param=name,
                code="context_length_exceeded",
            )
    if prompts > MAX_PROMPTS:
        raise InvalidRequest(f"{name}: {prompts} prompts, the limit is {MAX_PROMPTS}", param=name)


def _refuse_unsupported(fields: dict[str, Any], kind: type[Strict]) -> None:
    """Drops the fields that ask for nothing, and refuses by name those that ask for what we cannot do."""
    if not issubclass(kind, GenerationRequest):
        return
    for name in fields.keys() & IGNORED_FIELDS:
        del fields[name]
    for name in fields.keys() & NEUTRAL_FIELDS.keys() - kind.model_fields.keys():
        if not (asks_for_nothing(fields[name]) or is_neutral(fields[name], NEUTRAL_FIELDS[name])):
            raise InvalidRequest(f"{name} is not supported by this server.", param=name, code="unsupported")
        del fields[name]
    for name, field in kind.model_fields.items():  # null means the default, as in OpenAI's API
        if name in fields and fields[name] is None and not field.is_required():
            del fields[name]


def _judge_unknown(fields: dict[str, Any], kind: type[Strict], ignored: list[str] | None) -> None:
    """Drops those that ask for nothing. Of the others the first is refused: pydantic would refuse each."""
    for name in fields.keys() - kind.model_fields.keys():
        if asks_for_nothing(fields[name]):
            del fields[name]
        elif ignored is not None:
            ignored.append(name[:200])
            del fields[name]
        else:
            raise InvalidRequest(f"Unknown field: {name[:200]}", param=name[:200], code="unknown_field")


def from_validation(errors: list[Any]) -> InvalidRequest:
    """The first error of a pydantic validation, with the field's path (`messages[0].role`) as `param`."""
    first = errors[0]
    path = ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    path = path[:200]
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"Unknown field: {path}", param=path, code="unknown_field")
    if first["type"] == "missing":
        return InvalidRequest(f"Missing field: {path}", param=path)
    return InvalidRequest(f"{path}: {first['msg'].removeprefix('Value error, ')}", param=path or None)
