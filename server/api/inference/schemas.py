"""What clients may ask, field by field, with every limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    FiniteFloat,
    PlainValidator,
)

from server.api.inference.chat_messages import Messages
from server.api.inference.field_lists import NEUTRAL
from server.api.inference.strict import Strict
from server.api.inference.structured import Guided
from server.api.inference.tools import Offer

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
MAX_TEMPLATE_CHARACTERS = 65_536
MAX_DOCUMENTS = 256
MOST_TRUNCATED = 8  # contexts; of a longer prompt not even the end is looked for
MAX_ALLOWED_TOKENS = 32_768
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARACTERS = 128
MAX_MIX = 16
MAX_PRIORITY = 9  # a request can only step back: what is before 0 is not a client's to say
MAX_TIMEOUT_S = 86_400.0
_INT64 = 2**63

# Accepted and without effect: they change nothing in what is answered.
IGNORED_FIELDS = frozenset(
    {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    | {"prompt_cache_options", "session_id"}  # the latter of vLLM and SGLang
    | {"guided_decoding_backend"}  # vLLM's: here is one
)
# Known, but only with a value that asks for nothing.
NEUTRAL_FIELDS: Mapping[str, tuple[object, ...]] = {
    **NEUTRAL,
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
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


def _finite(value: object) -> object:
    """Of JSON as deep as its reader lets it be."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is not finite")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _finite(each)
    return value


_TemplateOptions = Annotated[
    dict[str, Any],
    Field(max_length=MAX_TEMPLATE_OPTIONS),
    _no_more_than(MAX_TEMPLATE_OPTIONS),
    AfterValidator(_finite),
]
_RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
_Adapters = Annotated[list[AdapterWeight], Field(min_length=1, max_length=MAX_MIX, fail_fast=True)]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # no effect
    continuous_usage_stats: bool | None = None  # in every chunk


def _nothings(values: tuple[object, ...]) -> list[object]:
    """All values of a neutral field that are accepted, each once."""
    empty: list[object] = [None, "", [], {}]
    return empty + [value for value in values if value is not None and value not in ("", [], {})]


def _known_besides(schema: dict[str, Any]) -> None:
    """Fields that are taken off before the others are judged, as the JSON schema says them."""
    for name in sorted(IGNORED_FIELDS):
        schema["properties"][name] = {"description": "Accepted and without effect."}
    for name, values in NEUTRAL_FIELDS.items():
        nothing = {"enum": _nothings(values), "description": "Asks for nothing."}
        schema["properties"].setdefault(name, nothing)


class GenerationRequest(Guided):
    """What both inference routes share."""

    model_config = pydantic.ConfigDict(json_schema_extra=_known_besides)

    model: str | None = None
    adapter: Annotated[str | None, Field(min_length=1)] = None
    lora_path: Annotated[str | None, Field(min_length=1)] = None  # SGLang's word for it
    adapter_id: Annotated[str | None, Field(min_length=1)] = None  # LoRAX's
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
    detokenize: bool = True
    allowed_token_ids: (
        Annotated[list[TokenId], Field(max_length=MAX_ALLOWED_TOKENS, fail_fast=True)] | None
    ) = None
    bad_words: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARACTERS)]],
            Field(max_length=MAX_BAD_WORDS, fail_fast=True),
        ]
        | None
    ) = None
    # The prompt's last tokens, or with `truncation_side` its first; -1: as many as the context has.
    truncate_prompt_tokens: Annotated[int | None, Field(ge=-1)] = None
    truncation_side: Literal["left", "right"] | None = None
    request_id: _RequestId | None = None
    rid: _RequestId | None = None  # SGLang's word for it
    cache_salt: Annotated[str | None, Field(min_length=1, max_length=1024)] = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    logprobs_mode: Literal["raw", "processed", "raw_logprobs", "processed_logprobs"] = "raw"
    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY)] = 0  # the smaller goes first
    timeout: Annotated[FiniteFloat | None, Field(gt=0, le=MAX_TIMEOUT_S)] = None  # seconds

    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @property
    def sequences(self) -> int:
        """How many are run for each prompt."""
        return self.n

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
    best_of: Annotated[int | None, Field(ge=1, le=MAX_CHOICES)] = None
    add_special_tokens: bool = True
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    echo: bool | None = False

    @property
    def sequences(self) -> int:
        return self.best_of or self.n

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs

    @property
    def echoed_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None


class ChatRequest(GenerationRequest, Offer):
    """Body of `POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Annotated[int | None, Field(ge=0)] = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None
    chat_template: Annotated[str | None, Field(min_length=1, max_length=MAX_TEMPLATE_CHARACTERS)] = None
    chat_template_kwargs: _TemplateOptions | None = None
    documents: Annotated[list[dict[str, Any]], Field(max_length=MAX_DOCUMENTS, fail_fast=True)] | None = None
    reasoning_effort: Annotated[str | FiniteFloat | None, Field(union_mode="left_to_right")] = None
    enable_thinking: bool | None = None
    add_generation_prompt: bool | None = None  # default: unless the last message is to be continued
    continue_final_message: bool = False
    add_special_tokens: bool = False
    echo: bool = False

    @property
    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(Strict):
    """Body of `POST /tokenize`: a prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
