"""The answer to a generation while it is written: what the inference routes share of it."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
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

Piece = bytes | bytearray

_ENCODER = msgspec.json.Encoder()
_NO_CHOICES, _CHOICES = b'"choices":[]', b'"choices":['


class _Kept:
    """What one choice has said so far, for an answer in one body.

    Log-probabilities are many: they are kept as the JSON that they become, made as they come.
    """

    def __init__(self) -> None:
        self.text: list[str] = []
        self.token_ids = array("i")
        self.columns: dict[str, bytearray] = {}  # JSON of each list of the route's struct, without brackets
        self.rest: dict[str, object] = {}  # its other fields

    def add(self, delta: Delta, logprobs: msgspec.Struct | None) -> None:
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        for name in logprobs.__struct_fields__ if logprobs is not None else ():
            value = getattr(logprobs, name)
            if not isinstance(value, list):
                self.rest[name] = value
                continue
            column = self.columns.setdefault(name, bytearray())
            if column:
                column += b","
            column += _ENCODER.encode(value)[1:-1]

    def logprobs(self) -> Iterator[Piece]:
        """The JSON of the whole struct."""
        separator = b"{"
        for name, column in self.columns.items():
            yield separator + _ENCODER.encode(name) + b":["
            yield column
            yield b"]"
            separator = b","
        for name, value in self.rest.items():
            yield separator + _ENCODER.encode(name) + b":" + _ENCODER.encode(value)
        yield b"}"


class Reply(ABC):
    """Writes the outputs of one request, whole or in chunks. A subclass is a route's shapes and no more."""

    id_prefix: ClassVar[str]
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
        self._kept: list[_Kept] = []
        self._started: set[int] = set()

    @abstractmethod
    def choice_of_part(self, delta: Delta, *, first: bool) -> AnyChoice:
        """A choice in a chunk; `first`: its first one."""

    @abstractmethod
    def choice_of_whole(self, choice: Choice, text: str) -> AnyChoice:
        """A choice in the whole answer, but for its log-probabilities."""

    @abstractmethod
    def logprobs(self, entries: list[TokenLogprobs]) -> msgspec.Struct:
        """The log-probabilities of some tokens in a row; lists of it are joined."""

    def start(self, adapter_version: str | None, choices: list[Choice]) -> None:
        self._head.adapter_version = adapter_version
        self._choices = choices
        self._kept = [_Kept() for _ in choices]

    def chunk(self, delta: Delta) -> bytes:
        """The JSON of one chunk; empty when the delta shows nothing."""
        first = delta.choice.index not in self._started
        says_more = self._token_ids_wanted or delta.logprobs or delta.finish_reason
        if not (delta.text or says_more or first):
            return b""
        self._started.add(delta.choice.index)
        shown = self.choice_of_part(delta, first=first)
        if self._token_ids_wanted:
            shown.token_ids = delta.token_ids
            shown.prompt_token_ids = delta.choice.request.prompt_token_ids if first else UNSET
        self._head.choices = [shown]
        return _ENCODER.encode(self._head)

    def usage_chunk(self) -> bytes | None:
        """The JSON of the usage chunk, where it was asked for."""
        if not self._usage_wanted:
            return None
        usage = usage_of(self._choices)
        return _ENCODER.encode(msgspec.structs.replace(self._head, choices=[], usage=usage))

    def add(self, delta: Delta) -> None:
        """Keeps a delta for `body`."""
        logprobs = self.logprobs(delta.logprobs) if delta.logprobs else None
        self._kept[delta.choice.index].add(delta, logprobs)

    def body(self) -> Iterator[Piece]:
        """The JSON of the whole answer, in pieces that were made already or are small."""
        head = self._head
        usage = usage_of(self._choices)
        whole = self.whole(head.id, head.created, head.model, head.adapter_version, [], usage)
        before, after = _ENCODER.encode(whole).split(_NO_CHOICES, 1)
        yield before + _CHOICES
        prompts: dict[int, bytes] = {}  # its token ids once, however many choices it has
        for choice, kept in zip(self._choices, self._kept, strict=True):
            if choice is not self._choices[0]:
                yield b","
            yield from self._whole_choice(choice, kept, prompts)
        yield b"]" + after

    def _whole_choice(self, choice: Choice, kept: _Kept, prompts: dict[int, bytes]) -> Iterator[Piece]:
        shown = self.choice_of_whole(choice, "".join(kept.text))
        yield _ENCODER.encode(shown)[:-1]
        if self._token_ids_wanted:
            at = choice.prompt_index
            if at not in prompts:
                prompts[at] = _ENCODER.encode(choice.request.prompt_token_ids)
            yield b',"token_ids":' + _ENCODER.encode(kept.token_ids.tolist())
            yield b',"prompt_token_ids":'
            yield prompts[at]
        yield b',"logprobs":'
        if kept.columns:
            yield from kept.logprobs()
        else:
            yield b"null"
        yield b"}"


def usage_of(choices: list[Choice]) -> Usage:
    """Tokens of one request: each prompt counted once, however many choices it has."""
    first_of = {choice.prompt_index: choice for choice in reversed(choices)}
    prompt = sum(len(choice.request.prompt_token_ids) for choice in first_of.values())
    cached = sum(choice.cached_tokens for choice in first_of.values())
    completion = sum(choice.completion_tokens for choice in choices)
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))
