"""What clients may ask, judged field by field. Every refusal is an InvalidRequest that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import pydantic
import pydantic_core
from pydantic import BeforeValidator, Field, FiniteFloat, PlainValidator

from server.errors import InvalidRequest

MAX_CHOICES = 128
MAX_PROMPTS = 256
MAX_SEQUENCES = 256  # prompts times n
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_MESSAGES = 4096
MAX_MIX = 16
MAX_PRIORITY = 9  # a request can only step back: what is before 0 is not a client's to say
MAX_TIMEOUT_S = 86_400.0
_LARGE = 64 * 2**10  # bytes; a body above this is looked at with care
_MOST_BESIDE = 256 * 2**10  # bytes; all fields but the prompt
_INT64 = 2**63

# Accepted and without effect: they change nothing in what is answered.
IGNORED_FIELDS = frozenset(
    {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
# Known, but only with a value that asks for nothing.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "service_tier": (None, "auto", "default"),
    "prompt_logprobs": (None,),
}


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _prompts(value: object) -> list[str | list[int]]:
    """A string, strings, token ids or lists of token ids -> a list of prompts of one kind."""
    prompts: list[Any] = value if isinstance(value, list) else [value]
    if prompts and all(type(item) is int for item in prompts):
        prompts = [prompts]
    if not prompts:
        raise ValueError("must not be empty")
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts, the limit is {MAX_PROMPTS}")
    if all(isinstance(prompt, str) for prompt in prompts):
        return prompts
    for prompt in prompts:
        if not isinstance(prompt, list) or not all(type(item) is int for item in prompt):
            raise ValueError(
                "must be a string, a list of strings, token ids, or a list of lists of token ids"
            )
        if prompt and min(prompt) < 0:
            raise ValueError("token ids must not be negative")
    return prompts


_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
_Stops = Annotated[list[_Stop], Field(max_length=MAX_STOPS)]
TokenId = Annotated[int, Field(ge=0)]
_Few = Field(min_length=1, max_length=MAX_PROMPTS)
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(
        _prompts,
        json_schema_input_type=str
        | Annotated[list[str], _Few]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[list[TokenId]], _Few],
    ),
]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class AdapterWeight(_Strict):
    """One member of a composition."""

    name: Annotated[str, Field(min_length=1)]
    weight: Annotated[FiniteFloat, Field(ge=-100, le=100)] = 1.0


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # no effect


def _known_besides(schema: dict[str, Any]) -> None:
    """Fields that are taken off before the others are judged, as the JSON schema says them."""
    for name in sorted(IGNORED_FIELDS):
        schema["properties"][name] = {"description": "Accepted and without effect."}
    for name, values in _NEUTRAL.items():
        schema["properties"][name] = {"enum": list(values), "description": "Asks for nothing."}


class GenerationRequest(_Strict):
    """What both inference routes share."""

    model_config = pydantic.ConfigDict(json_schema_extra=_known_besides)

    model: str | None = None
    adapter: Annotated[str | None, Field(min_length=1)] = None
    adapters: Annotated[list[AdapterWeight] | None, Field(min_length=1, max_length=MAX_MIX)] = None
    adapter_scale: Annotated[FiniteFloat | None, Field(ge=-100, le=100)] = None

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[FiniteFloat | None, Field(ge=0, le=2)] = None
    top_p: Annotated[FiniteFloat | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, lt=2**31)] = None  # -1 and 0: off
    min_p: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[FiniteFloat | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[FiniteFloat | None, Field(ge=-2, le=2)] = None
    repetition_penalty: Annotated[FiniteFloat, Field(gt=0, le=10)] = 1.0
    logit_bias: Annotated[
        dict[str, Annotated[FiniteFloat, Field(ge=-100, le=100)]] | None, Field(max_length=MAX_LOGIT_BIAS)
    ] = None
    seed: Annotated[int | None, Field(ge=-_INT64, lt=_INT64)] = None

    stop: Annotated[
        _Stops | None,
        BeforeValidator(_one_or_many, json_schema_input_type=_Stop | _Stops | None),
    ] = None
    stop_token_ids: Annotated[list[TokenId] | None, Field(max_length=MAX_STOPS)] = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY)] = 0  # the smaller goes first
    timeout: Annotated[FiniteFloat | None, Field(gt=0, le=MAX_TIMEOUT_S)] = None  # seconds

    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @property
    def top_logprobs_wanted(self) -> int | None:
        """How many likely tokens to report beside each sampled one; None = no log-probabilities."""
        raise NotImplementedError


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: Prompts
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    echo: bool | None = False

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs


class TextPart(_Strict):
    type: Literal["text"]
    text: str


def _content(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(_Strict):
    """One message of a chat. What an SDK sends back of an earlier answer is accepted where it is empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_content, json_schema_input_type=str | list[TextPart])]
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[None] | None, Field(max_length=0)] = None
    annotations: Annotated[list[Any] | None, Field(max_length=0)] = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: role, content (one string) and perhaps a name."""
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": "\n".join(part.text for part in self.content)} | named


class ChatRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None

    @property
    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(_Strict):
    """Body of `POST /tokenize`: a prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message] | None, Field(min_length=1, max_length=MAX_MESSAGES)] = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(_Strict):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]


Body = TypeVar("Body", bound=_Strict)


def parse(kind: type[Body], body: bytes, longest: int) -> Body:
    """A JSON body as one of the types above. `longest`: most tokens that one prompt can have.

    Safe to run in a thread: bodies too large for what they could mean are refused before the parser, which
    lets no other thread run, makes objects of them.
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
    role: str
    content: str | list[_PartShape]


class _PartShape(msgspec.Struct):
    type: str


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
        if raw.count(b",") >= longest * prompts + prompts:
            raise InvalidRequest(f"{name}: longer than the context of {longest} tokens", param=name)
    if prompts > MAX_PROMPTS:
        raise InvalidRequest(f"{name}: {prompts} prompts, the limit is {MAX_PROMPTS}", param=name)


def _refuse_unsupported(fields: dict[str, Any], kind: type[_Strict]) -> None:
    """Drops the fields that ask for nothing, and refuses by name those that ask for what we cannot do."""
    if not issubclass(kind, GenerationRequest):
        return
    if fields.get("best_of") is not None and fields["best_of"] == fields.get("n"):
        del fields["best_of"]
    for name in fields.keys() & IGNORED_FIELDS:
        del fields[name]
    for name in fields.keys() & _NEUTRAL.keys():
        if fields[name] not in _NEUTRAL[name]:
            raise InvalidRequest(f"{name} is not supported by this server.", param=name, code="unsupported")
        del fields[name]
    for name, field in kind.model_fields.items():  # null means the default, as in OpenAI's API
        if name in fields and fields[name] is None and not field.is_required():
            del fields[name]


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
