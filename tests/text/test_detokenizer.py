"""Incremental decoding against decoding at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer
from tests.text import tiny_tokenizer

BYTE_LEVEL = Tokenizer(tiny_tokenizer.byte_level())
PIECES = Tokenizer(tiny_tokenizer.sentence_piece_like())
# Many bytes of unfinished characters, so that long runs of noise are common.
TOKENS = st.integers(0, 299) | st.sampled_from(BYTE_LEVEL.encode("🙂你ö"))


def pieces_of(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@given(st.lists(TOKENS, max_size=80), st.booleans())
def test_pieces_join_to_the_whole(ids: list[int], skip: bool) -> None:
    whole = BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces_of(BYTE_LEVEL, ids, skip)) == whole


@given(st.text(max_size=40))
def test_text_comes_back_and_never_in_half_characters(text: str) -> None:
    pieces = pieces_of(BYTE_LEVEL, BYTE_LEVEL.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(
    st.lists(st.sampled_from(["▁hello", "▁world", "▁a", "b", "c", "o", "."]) | st.characters(codec="utf-8"))
)
def test_decoder_that_needs_context(words: list[str]) -> None:
    backend = tiny_tokenizer.sentence_piece_like()
    ids = []
    for word in words:
        known = backend.token_to_id(word)
        ids += [3 + byte for byte in word.encode()] if known is None else [known]
    whole = PIECES.decode(ids)
    if "\ufffd" not in whole:
        assert "".join(pieces_of(PIECES, ids)) == whole


@pytest.mark.parametrize("token", ["\u00f0", "</s>"])
def test_cost_of_a_token_does_not_grow(token: str) -> None:
    token_id = tiny_tokenizer.byte_level().token_to_id(token)
    longest = 0

    class Watched(Tokenizer):
        def decode(self, token_ids, *, skip_special_tokens=True):  # type: ignore[no-untyped-def]  # as its base
            nonlocal longest
            longest = max(longest, len(token_ids))
            return super().decode(token_ids, skip_special_tokens=skip_special_tokens)

    pieces_of(Watched(tiny_tokenizer.byte_level()), [token_id] * 500, skip=False)
    assert longest < 32


def test_special_tokens_are_left_out_or_shown() -> None:
    ids = [0, *BYTE_LEVEL.encode("hello"), 1]
    assert "".join(pieces_of(BYTE_LEVEL, ids)) == "hello"
    assert "".join(pieces_of(BYTE_LEVEL, ids, skip=False)) == "<s>hello</s>"
