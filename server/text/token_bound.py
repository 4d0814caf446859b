"""The fewest tokens that a text can become, without tokenising it.

A token takes up the characters of its spelling and no others, so a text has at least as many tokens as the
sum over its characters of 1 / (length of the longest token that has this character in it). What may change a
text before it meets the vocabulary is taken into account, and where that is not understood the bound is 0.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import tokenizers

from server.text.byte_level import BYTE_OF_CHAR

_PIECE = 2**16  # characters that are counted at a time
_ROUNDING = 1e-9  # of the sum, which is of floats
# A composed character stands for at most 4 others (UAX #15), so a boundary between two pieces hides at most
# so many bytes from the look at each piece alone.
_HIDDEN = 16
_SPLITS = ("Split", "Punctuation", "Digits", "UnicodeScripts")  # pre-tokenizers that only cut
_WHITESPACE = "".join(char for char in map(chr, range(sys.maxunicode + 1)) if char.isspace())


class TokenBound:
    """A lower bound on the tokens of a text, for one tokenizer."""

    def __init__(
        self,
        weights: Mapping[int, float],
        others: float,
        *,
        in_bytes: bool,
        form: Literal["NFC", "NFKC"] | None = None,
    ) -> None:
        """`weights`: the least part of a token that each code point, or byte where `in_bytes`, takes;
        `others`: of those that are not listed. `form`: the normal form that text is brought into before."""
        self._weights = weights
        self._others = others
        self._in_bytes = in_bytes
        self._form = form
        self._ascii = {code: weight for code, weight in weights.items() if code < 128}
        self._heaviest = max([*weights.values(), others])

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> TokenBound:
        """Of one that is not understood it is 0 for every text."""
        try:
            return _Rules(backend).bound()
        except _NotUnderstood:
            return cls({}, 0.0, in_bytes=False)

    def at_least(self, text: str, enough: int = sys.maxsize) -> int:
        """Tokens. Where there are more than `enough` it stops to count, so that a long text costs no more."""
        total = 0.0
        for start in range(0, len(text), _PIECE):
            total += self._of_piece(text[start : start + _PIECE])
            if total * (1 - _ROUNDING) > enough + 1:
                break
        return max(int(total * (1 - _ROUNDING)), 0)

    def _of_piece(self, piece: str) -> float:
        if self._form is None:
            return self._sum(piece)
        hidden = _HIDDEN * self._heaviest
        if unicodedata.is_normalized(self._form, piece):
            return max(self._sum(piece) - hidden, 0.0)
        # ASCII stays as it is in every form, but for one letter before each character that may join it.
        ascii_bytes = piece.encode("ascii", "ignore")
        others = len(piece) - len(ascii_bytes)
        counted = sum(self._ascii.get(byte, 0.0) * count for byte, count in Counter(ascii_bytes).items())
        return max(counted - others * self._heaviest - hidden, 0.0)

    def _sum(self, piece: str) -> float:
        codes: Iterable[int] = piece.encode("utf-8", "replace") if self._in_bytes else map(ord, piece)
        get, others = self._weights.get, self._others
        return sum(get(code, others) * count for code, count in Counter(codes).items())


class _NotUnderstood(Exception):
    """The tokenizer does something that this file does not know."""


class _Rules:
    """What one tokenizer does with a text before and by its vocabulary, read off its description."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        description: dict[str, Any] = json.loads(backend.to_str())
        self._model: dict[str, Any] = description["model"]
        self._vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=False)
        self._added = list(backend.get_added_tokens_decoder().values())
        self._form: Literal["NFC", "NFKC"] | None = None
        self._renamed: list[tuple[str, str]] = []  # one character that becomes another
        self._byte_level = False
        for step in _steps(description["normalizer"], "normalizers"):
            self._normalizer(step)
        for step in _steps(description["pre_tokenizer"], "pretokenizers"):
            self._pre_tokenizer(step)

    def bound(self) -> TokenBound:
        """Raises _NotUnderstood."""
        model = self._model
        prefixed = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        if model["type"] != "BPE" or prefixed or (self._form and not self._byte_level):
            raise _NotUnderstood
        longest = self._longest_bytes() if self._byte_level else self._longest_characters()
        weights = {code: 1 / length for code, length in longest.items()}
        if any(token.lstrip or token.rstrip for token in self._added):  # takes any amount of space with it
            blank = _WHITESPACE.encode() if self._byte_level else map(ord, _WHITESPACE)
            weights |= dict.fromkeys(blank, 0.0)
        if self._byte_level:
            return TokenBound(weights, 0.0, in_bytes=True, form=self._form)
        for old, new in self._renamed:
            in_added = max((len(t.content) for t in self._added if old in t.content), default=1)
            weights[ord(old)] = min(weights.get(ord(new), 0.0), 1 / in_added)
        return TokenBound(weights, self._others(), in_bytes=False)

    def _longest_bytes(self) -> dict[int, int]:
        """Byte -> bytes of the longest token with it. One that is no token by itself may be dropped."""
        longest: dict[int, int] = {}
        for token in self._by_length():
            for char in token:
                if char in BYTE_OF_CHAR and char in self._vocabulary:
                    longest.setdefault(BYTE_OF_CHAR[char], len(token))
            if len(longest) == 256:
                break
        for content in (token.content.encode() for token in self._added):
            for byte in content:
                if byte in longest:
                    longest[byte] = max(longest[byte], len(content))
        return longest

    def _longest_characters(self) -> dict[int, int]:
        longest: dict[int, int] = {}
        for token in self._by_length():
            for char in token:
                longest.setdefault(ord(char), len(token))
        for content in (token.content for token in self._added):
            for char in content:
                longest[ord(char)] = max(longest.get(ord(char), 1), len(content))
        dropped = [code for code in longest if not self._others() and chr(code) not in self._vocabulary]
        return {code: length for code, length in longest.items() if code not in dropped}

    def _by_length(self) -> list[str]:
        return sorted(self._vocabulary, key=len, reverse=True)

    def _others(self) -> float:
        """What a character that is in no token gives at least."""
        in_bytes = self._model["byte_fallback"] and all(
            f"<0x{byte:02X}>" in self._vocabulary for byte in range(256)
        )
        return 1.0 if in_bytes else 0.0

    def _normalizer(self, step: Mapping[str, Any]) -> None:
        if step["type"] in ("NFC", "NFKC"):
            if self._form not in (None, step["type"]):
                raise _NotUnderstood
            self._form = step["type"]
        elif step["type"] == "Replace":
            self._rename(step["pattern"].get("String", ""), step["content"])
        elif step["type"] != "Prepend":
            raise _NotUnderstood

    def _pre_tokenizer(self, step: Mapping[str, Any]) -> None:
        if step["type"] == "ByteLevel":
            self._byte_level = True
        elif step["type"] == "Metaspace":
            self._rename(" ", step["replacement"])
        elif step["type"] not in _SPLITS or step.get("behavior") == "Removed":
            raise _NotUnderstood

    def _rename(self, old: str, new: str) -> None:
        if len(old) != 1 or len(new) != 1 or self._byte_level:
            raise _NotUnderstood
        self._renamed.insert(0, (old, new))  # read backwards: what the last makes is what the vocabulary sees


def _steps(description: Mapping[str, Any] | None, name: str) -> Iterator[Mapping[str, Any]]:
    if description is None:
        return
    if description["type"] == "Sequence":
        for step in description[name]:
            yield from _steps(step, name)
    else:
        yield description
