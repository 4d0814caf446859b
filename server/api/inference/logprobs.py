"""Log-probabilities in the shapes of the APIs: names of tokens, columns of completions, entries of chats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import msgspec

from server.api.inference.generation import TokenLogprobs
from server.api.inference.replies import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    TopLogprob,
)
from server.messages import Logprobs
from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer

_ENCODER = msgspec.json.Encoder()


class TokenNames:
    """What tokens are called. `as_ids`: `token_id:7`, as all are where the model has no tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def unique(self, token_id: int) -> str:
        """Its text; `bytes:\\xe2` where that is a part of a character, so that names do not collide."""
        raw = self.bytes(token_id)
        if self._as_ids or not raw:
            return f"token_id:{token_id}"
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def text(self, token_id: int) -> str:
        """Its text, with a mark for what is a part of a character."""
        return f"token_id:{token_id}" if self._as_ids else self.bytes(token_id).decode(errors="replace")

    def bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id) if self._tokenizer else b""

    def completion(self, entries: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        """Entries as columns. A sampled token is listed also where it is none of the likeliest."""
        return CompletionLogprobs(
            tokens=[self.unique(entry.values.token_id) for entry in entries],
            token_logprobs=[entry.values.logprob for entry in entries],
            top_logprobs=[self._top(entry.values) for entry in entries],
            text_offset=[entry.text_offset for entry in entries],
        )

    def _top(self, values: Logprobs) -> dict[str, float]:
        top = {self.unique(token_id): logprob for token_id, logprob in values.top}
        return {self.unique(values.token_id): values.logprob} | top

    def chat(self, entries: Iterable[TokenLogprobs]) -> ChatLogprobs:
        return ChatLogprobs([self._chat_entry(entry.values) for entry in entries])

    def _chat_entry(self, values: Logprobs) -> ChatLogprob:
        top = [TopLogprob(self.text(i), value, list(self.bytes(i))) for i, value in values.top]
        return ChatLogprob(self.text(values.token_id), values.logprob, list(self.bytes(values.token_id)), top)

    def prompt_entry(self, values: Logprobs, most: int) -> dict[str, PromptLogprob]:
        """Of one prompt token and the `most` likeliest in its place, in vLLM's shape."""
        own = self._prompt_logprob(values.token_id, values.logprob, values.rank)
        top = enumerate(values.top[:most], 1)
        likeliest = {str(i): self._prompt_logprob(i, value, rank) for rank, (i, value) in top}
        return {str(values.token_id): own} | likeliest | {str(values.token_id): own}

    def _prompt_logprob(self, token_id: int, logprob: float, rank: int) -> PromptLogprob:
        return PromptLogprob(logprob, rank, self.text(token_id) if self._tokenizer else None)


class EchoedPrompt:
    """A prompt's columns, piece by piece. `most`: of the likeliest tokens in each one's place."""

    def __init__(
        self, names: TokenNames, tokenizer: Tokenizer | None, token_ids: list[int], most: int
    ) -> None:
        self._names, self._most = names, most
        self._detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self._characters = 0
        self.first = CompletionLogprobs([names.unique(token_ids[0])], [None], [None], [0])
        self._push(token_ids[0])

    def columns(self, piece: Iterable[Logprobs]) -> CompletionLogprobs:
        """Of the next tokens of the prompt, from the second on."""
        return self._names.completion([self._entry(values) for values in piece])

    def _entry(self, values: Logprobs) -> TokenLogprobs:
        offset = self._characters
        self._push(values.token_id)
        return TokenLogprobs(msgspec.structs.replace(values, top=values.top[: self._most]), offset)

    def _push(self, token_id: int) -> None:
        if self._detokenizer is not None:
            self._characters += len(self._detokenizer.push(token_id))


def joined(first: CompletionLogprobs | None, second: CompletionLogprobs | None) -> CompletionLogprobs | None:
    """One after the other; either may be missing."""
    if first is None or second is None:
        return first or second
    both = zip(*(msgspec.structs.astuple(part) for part in (first, second)), strict=True)
    return CompletionLogprobs(*([*one, *other] for one, other in both))


class Columns:
    """Lists of the fields of one struct as JSON, made as they come: they are many."""

    def __init__(self) -> None:
        self._lists: dict[str, bytearray] = {}  # without brackets
        self._rest: dict[str, object] = {}  # the other fields

    def __bool__(self) -> bool:
        return bool(self._lists)

    def add(self, struct: msgspec.Struct) -> None:
        for name in struct.__struct_fields__:
            value = getattr(struct, name)
            if not isinstance(value, list):
                self._rest[name] = value
                continue
            column = self._lists.setdefault(name, bytearray())
            if column and value:
                column += b","
            column += _ENCODER.encode(value)[1:-1]

    @staticmethod
    def json(*parts: Columns) -> Iterator[bytes | bytearray]:
        """Of the whole struct, the parts' lists one after the other; `null` where there are none."""
        there = [part for part in parts if part]
        if not there:
            yield b"null"
            return
        separator = b"{"
        for name in there[0]._lists:
            yield separator + _ENCODER.encode(name) + b":["
            yield from chain(*((b"," if at else b"", part._lists[name]) for at, part in enumerate(there)))
            yield b"]"
            separator = b","
        for name, value in there[0]._rest.items():
            yield separator + _ENCODER.encode(name) + b":" + _ENCODER.encode(value)
        yield b"}"
