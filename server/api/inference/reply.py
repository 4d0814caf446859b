"""The answer to a generation while it is written: what the inference routes share of it."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from typing import ClassVar

import msgspec
from msgspec import UNSET

from server.api.face import Face
from server.api.inference.generation import Choice, Delta, TokenLogprobs
from server.api.inference.replies import (
    Answer,
    ChatChoice,
    ChatChunkChoice,
    CompletionChoice,
    PromptTokensDetails,
    Usage,
)
from server.api.inference.schemas import GenerationRequest

AnyChoice = CompletionChoice | ChatChoice | ChatChunkChoice

_ENCODER = msgspec.json.Encoder()


class Reply(ABC):
    """Writes the outputs of one request, whole or in chunks. A subclass is a route's shapes and no more."""

    id_prefix: ClassVar[str]
    operation: ClassVar[str]  # in the words of OpenTelemetry's gen_ai conventions
    whole: ClassVar[type[Answer]]
    part: ClassVar[type[Answer]]

    def __init__(self, request: GenerationRequest, face: Face) -> None:
        self.tokenizer = face.tokenizer
        self._usage_wanted = bool(request.stream_options and request.stream_options.include_usage)
        self._token_ids_wanted = request.return_token_ids
        self._head = self.part(
            id=f"{self.id_prefix}-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model or face.base.name,
            adapter_version=None,
            choices=[],
            usage=None if self._usage_wanted else UNSET,
        )
        self._choices: list[Choice] = []
        self._kept: list[list[Delta]] = []
        self._started: set[int] = set()

    @property
    def id(self) -> str:
        return self._head.id

    @property
    def model(self) -> str:
        """The name that the client gave, or the base model's."""
        return self._head.model

    @abstractmethod
    def choice_of_part(self, delta: Delta, *, first: bool) -> AnyChoice:
        """A choice in a chunk; `first`: its first one."""

    @abstractmethod
    def choice_of_whole(self, choice: Choice, deltas: list[Delta]) -> AnyChoice:
        """A choice in the whole answer."""

    def start(self, adapter_version: str | None, choices: list[Choice]) -> None:
        self._head.adapter_version = adapter_version
        self._choices = choices
        self._kept = [[] for _ in choices]

    def chunk(self, delta: Delta) -> bytes:
        """The JSON of one chunk; empty when the delta shows nothing."""
        first = delta.choice.index not in self._started
        says_more = self._token_ids_wanted or delta.logprobs or delta.finish_reason
        if not (delta.text or says_more or first):
            return b""
        self._started.add(delta.choice.index)
        shown = self.choice_of_part(delta, first=first)
        self._head.choices = [self._with_tokens(shown, delta.choice, [delta], with_prompt=first)]
        return _ENCODER.encode(self._head)

    def usage_chunk(self) -> bytes | None:
        """The JSON of the usage chunk, where it was asked for."""
        if not self._usage_wanted:
            return None
        usage = usage_of(self._choices)
        return _ENCODER.encode(msgspec.structs.replace(self._head, choices=[], usage=usage))

    def add(self, delta: Delta) -> None:
        """Keeps a delta for `body`."""
        self._kept[delta.choice.index].append(delta)

    def body(self) -> bytes:
        """The JSON of the whole answer."""
        head = self._head
        choices = [
            self._with_tokens(self.choice_of_whole(choice, deltas), choice, deltas, with_prompt=True)
            for choice, deltas in zip(self._choices, self._kept, strict=True)
        ]
        usage = usage_of(self._choices)
        whole = self.whole(head.id, head.created, head.model, head.adapter_version, choices, usage)
        return _ENCODER.encode(whole)

    def _with_tokens(
        self, shown: AnyChoice, choice: Choice, deltas: list[Delta], *, with_prompt: bool
    ) -> AnyChoice:
        if self._token_ids_wanted:
            shown.token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
            shown.prompt_token_ids = choice.request.prompt_token_ids if with_prompt else UNSET
        return shown


def logprobs_of(deltas: list[Delta]) -> list[TokenLogprobs]:
    return [entry for delta in deltas for entry in delta.logprobs or ()]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def usage_of(choices: list[Choice]) -> Usage:
    """Tokens of one request: each prompt counted once, however many choices it has."""
    first_of = {choice.prompt_index: choice for choice in reversed(choices)}
    prompt = sum(len(choice.request.prompt_token_ids) for choice in first_of.values())
    cached = sum(choice.cached_tokens for choice in first_of.values())
    completion = sum(choice.completion_tokens for choice in choices)
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))
