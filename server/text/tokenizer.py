"""Text to token ids and back, from the files beside the base model's weights."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from server.text.byte_level import BYTE_OF_CHAR
from server.text.token_bound import TokenBound

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """The `tokenizers` library on a `tokenizer.json`, with what generation needs to know of its tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: dict[str, str] | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._bytes: dict[int, bytes] = {}  # of tokens that were asked for, as many as the model can name
        self.special_tokens = special_tokens or {}  # "bos_token" -> "<s>", for chat templates
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        decoder = json.loads(backend.to_str())["decoder"] or {}
        # A byte-level decoder joins the bytes of its tokens: what a token decodes to never depends on
        # the tokens before it, so an incremental decoder needs no context.
        self.context_free = decoder.get("type") == "ByteLevel"

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """Reads `tokenizer.json` and the special tokens beside it; None when the folder has none.

        Raises ValueError when the file cannot be read as a tokenizer.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer.json cannot be read: {error}") from error
        return cls(backend, _special_tokens(folder))

    def to_json(self) -> str:
        """As `tokenizer.json` has it."""
        text: str = self._backend.to_str()
        return text

    @cached_property
    def bound(self) -> TokenBound:
        """The fewest tokens that a text can have. Made once, in up to a second for a large vocabulary."""
        return TokenBound.of(self._backend)

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the specials that the tokenizer's own post-processor adds."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, text: str) -> list[int]:
        """Token ids of a rendered chat prompt: the template has written every special token itself."""
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # `_fast` does without the places of tokens in the text, which nobody asks for.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token; None for an id that the tokenizer does not have."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; they may be only a part of a UTF-8 character."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._token_bytes(token_id)
        return known

    def _token_bytes(self, token_id: int) -> bytes:
        token = self.token(token_id)
        if token is None:
            return b""
        if self.context_free:
            if all(char in BYTE_OF_CHAR for char in token):
                return bytes(BYTE_OF_CHAR[char] for char in token)
            return token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()


def _special_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... from special_tokens_map.json, overridden by tokenizer_config.json."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_json(folder / name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                tokens[key] = content
    return tokens


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no such file."""
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}
