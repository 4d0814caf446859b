"""Token ids and the bytes behind them."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.text.tokenizer import Tokenizer
from tests.text import tiny_tokenizer


def test_load(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_tokenizer.write(tmp_path))
    assert tokenizer is not None
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.decode(tokenizer.encode("hello 你好")) == "hello 你好"


def test_no_tokenizer_and_a_broken_one(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("backend", [tiny_tokenizer.byte_level(), tiny_tokenizer.sentence_piece_like()])
def test_bytes_of_tokens_join_to_the_text(backend) -> None:  # type: ignore[no-untyped-def]  # a Rust class
    tokenizer = Tokenizer(backend)
    ids = [3 + byte for byte in "ö🙂".encode()] if not tokenizer.context_free else tokenizer.encode("ö🙂")
    assert b"".join(tokenizer.token_bytes(i) for i in ids).decode() == "ö🙂"


def test_bytes_of_other_tokens() -> None:
    pieces = Tokenizer(tiny_tokenizer.sentence_piece_like())
    assert pieces.token_bytes(260) == b" hello"
    assert pieces.token_bytes(10**6) == b""
    assert Tokenizer(tiny_tokenizer.byte_level()).token_bytes(1) == b"</s>"


def test_truncation_of_the_file_is_switched_off(tmp_path: Path) -> None:
    backend = tiny_tokenizer.byte_level().__class__.from_str(tiny_tokenizer.byte_level().to_str())
    backend.enable_truncation(2)
    assert len(Tokenizer(backend).encode("the quick brown fox")) > 2
