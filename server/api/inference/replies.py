"""What is answered, in OpenAI's shapes. msgspec structs: one encodes in about a microsecond."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

ChoiceFinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Answer(msgspec.Struct, gc=False):
    """A whole answer of an inference route, or one chunk of a streamed one."""

    id: str
    created: int
    model: str
    adapter_version: str | None
    choices: list[Any]
    usage: Usage | UnsetType | None = UNSET
    object: str = ""


class CompletionLogprobs(msgspec.Struct):
    """Columns: entry i of each is of token i. `text_offset` counts characters from the choice's beginning.

    Of the first token of an echoed prompt nothing is known.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(msgspec.Struct, gc=False):
    """Of one token in a place of the prompt. `rank`: 1 is the likeliest there."""

    logprob: float
    rank: int
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # by token id; nothing of the first


class CompletionChoice(msgspec.Struct, gc=False):
    index: int
    text: str
    logprobs: CompletionLogprobs | UnsetType | None = None
    finish_reason: ChoiceFinishReason | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Answer, gc=False):
    """A whole completion, and one chunk of a streamed one: the API gives both the same shape."""

    choices: list[CompletionChoice]
    object: str = "text_completion"


class TopLogprob(msgspec.Struct, gc=False):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, gc=False):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]
    refusal: None = None


class CalledPart(msgspec.Struct):
    """A function's name and arguments (JSON), or a part of them."""

    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCallPart(msgspec.Struct):
    """A call of a tool, or in a chunk a part of one."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: CalledPart = msgspec.field(default_factory=CalledPart)


class ChatMessage(msgspec.Struct):
    content: str | None
    role: str = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallPart] | UnsetType = UNSET
    function_call: CalledPart | UnsetType = UNSET


class ChatDelta(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCallPart] | UnsetType = UNSET
    function_call: CalledPart | UnsetType = UNSET


class ChatChoice(msgspec.Struct, gc=False):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | UnsetType | None = None
    finish_reason: ChatFinishReason | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, gc=False):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Chat(Answer, gc=False):
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatChunk(Answer, gc=False):
    choices: list[ChatChunkChoice]
    object: str = "chat.completion.chunk"
    prompt_token_ids: list[int] | UnsetType = UNSET  # in the first chunk


class Model(msgspec.Struct, frozen=True):
    """One entry of `GET /v1/models`: the base model (no parent) or an adapter."""

    id: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    adapter_version: str | None = None
    object: str = "model"


class ModelList(msgspec.Struct, frozen=True):
    data: list[Model]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: str = "list"


class Tokenized(msgspec.Struct, frozen=True):
    """A prompt as token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | UnsetType = UNSET


class Detokenized(msgspec.Struct, frozen=True):
    """Token ids as text."""

    prompt: str


class Status(msgspec.Struct, frozen=True):
    """Answer of the probes."""

    status: str
