"""What clients may ask, field by field, with every limit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    FiniteFloat,
    PlainValidator,
    ValidationInfo,
    field_validator,
)

from server.api.inference.strict import Strict
from server.api.inference.structured import Guided
from server.api.inference.tools import MAX_TOOLS, CalledFunction, CalledTool, Offer

MAX_CHOICES = 128
MAX_PROMPTS = 256
MAX_SEQUENCES = 256  # prompts times n
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_ALL_STOP_CHARACTERS = 4096  # of one request together
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_LOGPROB_ENTRIES = 2**19  # of one answer, which has up to 75 bytes for each
MAX_TEMPLATE_OPTIONS = 64
MAX_MESSAGES = 4096
MAX_MIX = 16
MAX_PRIORITY = 9  # a request can only step back: what is before 0 is not a client's to say
MAX_TIMEOUT_S = 86_400.0
_INT64 = 2**63

# Accepted and without effect: they change nothing in what is answered.
IGNORED_FIELDS = frozenset(
    {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
# Known, but only with a value that asks for nothing.
NEUTRAL_FIELDS: Mapping[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "service_tier": (None, "auto", "default"),
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


def _few_characters(stops: list[str]) -> list[str]:
    characters = sum(map(len, stops))
    if characters > MAX_ALL_STOP_CHARACTERS:
        raise ValueError(f"{characters} characters together, the limit is {MAX_ALL_STOP_CHARACTERS}")
    return stops


def _no_more_than(limit: int) -> BeforeValidator:
    """Of an object's keys, before each is judged."""

    def judge(value: object) -> object:
        if isinstance(value, dict) and len(value) > limit:
            raise ValueError(f"{len(value)} entries, the limit is {limit}")
        return value

    return BeforeValidator(judge)


# Lists end at their first fault (fail_fast): to make an error of each item would take longer than anything.
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
_Stops = Annotated[list[_Stop], Field(max_length=MAX_STOPS, fail_fast=True), AfterValidator(_few_characters)]
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


class AdapterWeight(Strict):
    """One member of a composition."""

    name: Annotated[str, Field(min_length=1)]
    weight: Annotated[FiniteFloat, Field(ge=-100, le=100)] = 1.0


_LogitBias = Annotated[
    dict[str, Annotated[FiniteFloat, Field(ge=-100, le=100)]],
    Field(max_length=MAX_LOGIT_BIAS),
    _no_more_than(MAX_LOGIT_BIAS),
]
_TemplateOptions = Annotated[
    dict[str, str | int | FiniteFloat | bool | None],
    Field(max_length=MAX_TEMPLATE_OPTIONS),
    _no_more_than(MAX_TEMPLATE_OPTIONS),
]
_Adapters = Annotated[list[AdapterWeight], Field(min_length=1, max_length=MAX_MIX, fail_fast=True)]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # no effect


def _known_besides(schema: dict[str, Any]) -> None:
    """Fields that are taken off before the others are judged, as the JSON schema says them."""
    for name in sorted(IGNORED_FIELDS):
        schema["properties"][name] = {"description": "Accepted and without effect."}
    for name, values in NEUTRAL_FIELDS.items():
        schema["properties"].setdefault(name, {"enum": list(values), "description": "Asks for nothing."})


class GenerationRequest(Guided):
    """What both inference routes share."""

    model_config = pydantic.ConfigDict(json_schema_extra=_known_besides)

    model: str | None = None
    adapter: Annotated[str | None, Field(min_length=1)] = None
    adapters: (
        Annotated[list[AdapterWeight], Field(min_length=1, max_length=MAX_MIX, fail_fast=True)] | None
    ) = None
    adapter_scale: Annotated[FiniteFloat | None, Field(ge=-100, le=100)] = None

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: Annotated[int | None, Field(ge=0)] = None  # 0: the prompt alone is computed
    min_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[FiniteFloat | None, Field(ge=0, le=2)] = None
    top_p: Annotated[FiniteFloat | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, lt=2**31)] = None  # -1 and 0: off
    min_p: Annotated[FiniteFloat, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[FiniteFloat | None, Field(ge=-2, le=2)] = None
    frequency_penalty: Annotated[FiniteFloat | None, Field(ge=-2, le=2)] = None
    # It divides logits: what is near to 0 makes them infinite.
    repetition_penalty: Annotated[FiniteFloat, Field(ge=0.01, le=10)] = 1.0
    logit_bias: _LogitBias | None = None
    seed: Annotated[int | None, Field(ge=-_INT64, lt=_INT64)] = None

    stop: Annotated[
        _Stops | None,
        BeforeValidator(_one_or_many, json_schema_input_type=_Stop | _Stops | None),
    ] = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    logprobs_mode: Literal["raw", "processed", "raw_logprobs", "processed_logprobs"] = "raw"
    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY)] = 0  # the smaller goes first
    timeout: Annotated[FiniteFloat | None, Field(gt=0, le=MAX_TIMEOUT_S)] = None  # seconds

    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @property
    def top_logprobs_wanted(self) -> int | None:
        """How many likely tokens to report beside each sampled one; None = no log-probabilities."""
        raise NotImplementedError

    @property
    def echoed_logprobs(self) -> int | None:
        """The same beside each token of the prompt, in the same list; None where there are none."""
        return None


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: Prompts
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    echo: bool | None = False

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs

    @property
    def echoed_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None


class TextPart(Strict):
    type: Literal["text"]
    text: str


def _content(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(Strict):
    """One message of a chat. What an SDK sends back of an earlier answer is accepted where it is empty."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    name: str | None = None
    refusal: str | None = None
    audio: None = None
    function_call: CalledFunction | None = None
    tool_calls: Annotated[list[CalledTool] | None, Field(max_length=MAX_TOOLS, fail_fast=True)] = None
    tool_call_id: str | None = None
    annotations: Annotated[list[Any] | None, Field(max_length=0)] = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    content: Annotated[  # after those that may stand in its place
        Annotated[list[TextPart], Field(fail_fast=True)] | None,
        BeforeValidator(_content, json_schema_input_type=str | list[TextPart] | None),
    ] = Field(None, validate_default=True)

    @field_validator("tool_calls", "function_call")
    @classmethod
    def _of_an_assistant(cls, calls: object, info: ValidationInfo) -> object:
        if calls and info.data.get("role") not in (None, "assistant"):
            raise ValueError("only an assistant calls tools")
        return calls

    @field_validator("content")
    @classmethod
    def _says_something(cls, content: object, info: ValidationInfo) -> object:
        others = ("tool_calls", "function_call", "refusal")
        if content is None and not any(info.data.get(name) for name in others):
            raise ValueError("must be a text or a list of parts")
        return content

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: role, content (one string), and what else there is."""
        roles = {"developer": "system", "function": "tool"}
        content = self.refusal or "" if self.content is None else "\n".join(p.text for p in self.content)
        message: dict[str, Any] = {"role": roles.get(self.role, self.role), "content": content}
        calls = [
            {"id": call.id, "type": "function", "function": call.function.for_template()}
            for call in self.tool_calls or ()
        ]
        if self.function_call is not None:
            calls = [{"type": "function", "function": self.function_call.for_template()}]
        reasoning = self.reasoning_content or self.reasoning
        more = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": calls or None,
            "reasoning_content": reasoning,
        }
        return message | {name: value for name, value in more.items() if value is not None}


_Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(GenerationRequest, Offer):
    """Body of `POST /v1/chat/completions`."""

    messages: _Messages
    max_completion_tokens: Annotated[int | None, Field(ge=0)] = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    chat_template_kwargs: _TemplateOptions | None = None

    @property
    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Strict):
    """Body of `POST /tokenize`: a prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None
    ) = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
