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
from server.api.inference.logprobs import Columns, TokenNames
from server.api.inference.replies import (
    Answer,
    ChatChoice,
    ChatChunkChoice,
    CompletionChoice,
    PromptTokensDetails,
    Usage,
)
from server.api.inference.schemas import GenerationRequest
from server.messages import Logprobs

AnyChoice = CompletionChoice | ChatChoice | ChatChunkChoice

Piece = bytes | bytearray

_ENCODER = msgspec.json.Encoder()
_NO_CHOICES, _CHOICES = b'"choices":[]', b'"choices":['


class _Kept:
    """What one choice has said so far, for an answer in one body."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.token_ids = array("i")
        self.logprobs = Columns()
        self.logprob = 0.0  # of its tokens together, where they were asked for

    def add(self, delta: Delta, logprobs: msgspec.Struct | None) -> None:
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprob += sum(entry.values.logprob for entry in delta.logprobs or ())
        if logprobs is not None:
            self.logprobs.add(logprobs)


class Reply(ABC):
    """Writes the outputs of one request, whole or in chunks. A subclass is a route's shapes and no more."""

    id_prefix: ClassVar[str]
    operation: ClassVar[str]  # in the words of OpenTelemetry's gen_ai conventions
    whole: ClassVar[type[Answer]]
    part: ClassVar[type[Answer]]

    def __init__(self, request: GenerationRequest, face: Face) -> None:
        self.tokenizer = face.tokenizer
        self.names = TokenNames(face.tokenizer, as_ids=request.return_tokens_as_token_ids)
        options = request.stream_options
        self._usage_wanted = bool(options and options.include_usage)
        self._usage_in_chunks = bool(options and options.continuous_usage_stats)
        self._tokens_told = 0  # in chunks
        self._logprobs_wanted = request.top_logprobs_wanted is not None
        self.token_ids_wanted = request.return_token_ids
        self._prompt_logprobs_wanted = request.prompt_logprobs
        self._head = self.part(
            id=f"{self.id_prefix}-{request.request_id or request.rid or uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model or face.base.name,
            adapter_version=None,
            choices=[],
            usage=None if self._usage_wanted else UNSET,
        )
        self.choices: list[Choice] = []
        self._kept: list[_Kept] = []
        self._prompt_logprobs: dict[int, bytearray] = {}  # JSON of each prompt's, without the brackets
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
    def choice_of_whole(self, choice: Choice, text: str) -> AnyChoice:
        """A choice in the whole answer, but for its log-probabilities."""

    @abstractmethod
    def logprobs(self, entries: list[TokenLogprobs]) -> msgspec.Struct:
        """The log-probabilities of some tokens in a row; lists of it are joined."""

    def start(self, adapter_version: str | None, choices: list[Choice]) -> None:
        self._head.adapter_version = adapter_version
        self.choices = choices
        self._kept = [_Kept() for _ in choices]
        if self._prompt_logprobs_wanted is not None:
            self._prompt_logprobs = {choice.prompt_index: bytearray(b"null") for choice in choices}

    def chunks(self, delta: Delta) -> Iterator[bytes]:
        """The JSON of each chunk; none when the delta shows nothing."""
        if delta.prompt_logprobs is not None:
            return
        first = not self.has_started(delta.choice)
        self._tokens_told += len(delta.token_ids)
        says_more = self.token_ids_wanted or delta.logprobs or delta.finish_reason
        if delta.text or says_more or first:
            yield self.chunk(delta.choice, delta.token_ids, self.choice_of_part(delta, first=first))

    def has_started(self, choice: Choice) -> bool:
        """Whether there was a chunk of it."""
        return choice.index in self._started

    def chunk(self, choice: Choice, token_ids: list[int], shown: AnyChoice) -> bytes:
        """The JSON of a chunk with what is `shown` of this choice."""
        first = not self.has_started(choice)
        self._started.add(choice.index)
        if self.token_ids_wanted:
            shown.token_ids = token_ids
            shown.prompt_token_ids = choice.request.prompt_token_ids if first else UNSET
        return _ENCODER.encode(self.head_of_part([shown]))

    def head_of_part(self, choices: list[AnyChoice]) -> Answer:
        """A chunk with these choices; used before the next is asked for."""
        self._head.choices = choices
        if self._usage_in_chunks:
            self._head.usage = usage_of(self.choices, self._tokens_told)
        return self._head

    def usage_chunk(self) -> bytes | None:
        """The JSON of the usage chunk, where it was asked for."""
        if not self._usage_wanted:
            return None
        usage = usage_of(self.choices)
        return _ENCODER.encode(msgspec.structs.replace(self._head, choices=[], usage=usage))

    def add(self, delta: Delta) -> None:
        """Keeps a delta for `body`."""
        if delta.prompt_logprobs is not None:
            self.add_prompt(delta.choice.prompt_index, delta.prompt_logprobs)
            return
        logprobs = self.logprobs(delta.logprobs) if delta.logprobs and self._logprobs_wanted else None
        self._kept[delta.choice.index].add(delta, logprobs)

    def add_prompt(self, prompt_index: int, piece: list[Logprobs]) -> None:
        """Keeps what is known of the prompt's next tokens."""
        if self._prompt_logprobs_wanted is not None:
            most = self._prompt_logprobs_wanted
            entries = [self.names.prompt_entry(values, most) for values in piece]
            self._prompt_logprobs[prompt_index] += b"," + _ENCODER.encode(entries)[1:-1]

    def body(self) -> Iterator[Piece]:
        """The JSON of the whole answer, in pieces that were made already or are small."""
        head = self._head
        usage = usage_of(self.choices)
        whole = self.whole(head.id, head.created, head.model, head.adapter_version, [], usage)
        before, after = _ENCODER.encode(whole).split(_NO_CHOICES, 1)
        yield before + _CHOICES
        prompts: dict[int, bytes] = {}  # its token ids once, however many choices it has
        for index, choice in enumerate(self.shown()):
            if index:
                yield b","
            yield from self._whole_choice(choice, index, prompts)
        yield b"]"
        yield from self.beside_choices()
        yield after

    def shown(self) -> list[Choice]:
        """Those that the whole answer has."""
        return self.choices

    def likelihood(self, choice: Choice) -> float:
        """The mean log-probability of its tokens."""
        kept = self._kept[choice.index]
        return kept.logprob / max(len(kept.token_ids), 1)

    def _whole_choice(self, choice: Choice, index: int, prompts: dict[int, bytes]) -> Iterator[Piece]:
        kept = self._kept[choice.index]
        shown = self.choice_of_whole(choice, "".join(kept.text))
        shown.index = index
        yield _ENCODER.encode(shown)[:-1]
        if self.token_ids_wanted:
            at = choice.prompt_index
            if at not in prompts:
                prompts[at] = _ENCODER.encode(choice.request.prompt_token_ids)
            yield b',"token_ids":' + _ENCODER.encode(kept.token_ids.tolist())
            yield b',"prompt_token_ids":'
            yield prompts[at]
        yield b',"logprobs":'
        yield from Columns.json(self.columns_of_prompt(choice.prompt_index), kept.logprobs)
        yield from self.within_choice(choice)
        yield b"}"

    def columns_of_prompt(self, prompt_index: int) -> Columns:
        """What stands before a choice's own log-probabilities."""
        return Columns()

    def within_choice(self, choice: Choice) -> Iterator[Piece]:
        """The last fields of a choice, each after a comma."""
        yield from ()

    def beside_choices(self) -> Iterator[Piece]:
        """Fields of the whole answer after its choices, each after a comma."""
        yield from ()

    def prompt_logprobs(self, prompt_index: int) -> Iterator[Piece]:
        """The field, after a comma, where it was asked for."""
        if (entries := self._prompt_logprobs.get(prompt_index)) is not None:
            yield b',"prompt_logprobs":['
            yield entries
            yield b"]"


def usage_of(choices: list[Choice], told: int | None = None) -> Usage:
    """Tokens of one request: each prompt counted once, however many choices it has. `told`: those of the
    output; None: all."""
    first_of = {choice.prompt_index: choice for choice in reversed(choices)}
    prompt = sum(len(choice.request.prompt_token_ids) for choice in first_of.values())
    cached = sum(choice.cached_tokens for choice in first_of.values())
    completion = sum(choice.completion_tokens for choice in choices) if told is None else told
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))
