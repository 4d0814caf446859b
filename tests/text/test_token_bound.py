"""The bound against the tokenizer itself: never above what it makes, and of use where it is understood."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from server.text.token_bound import TokenBound
from tests.text import tiny_tokenizer


def copied(backend: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(backend.to_str())


def byte_level(*, form: str | None = None, added: list[AddedToken] | None = None) -> Tokenizer:
    """Bytes with a few long tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)}
    merges = []
    for token in ("ee", "eeee", "eeeeeeee", "ĠĠ", "ĠĠĠĠ", "ĠĠĠĠĠĠĠĠ", "th", "the", "Ġthe", "Ã©", "Ã©Ã©"):
        half = {"the": 2, "Ġthe": 1, "Ã©": 1, "th": 1}.get(token, len(token) // 2)
        merges.append((token[:half], token[half:]))
        vocabulary[token] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+(?!\S)|[^\s]+| ?[^\s]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if form:
        backend.normalizer = getattr(normalizers, form)()
    backend.add_tokens(added or [])
    return backend


def renamed_spaces() -> Tokenizer:
    backend = copied(tiny_tokenizer.sentence_piece_like())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def with_metaspace() -> Tokenizer:
    backend = copied(tiny_tokenizer.sentence_piece_like())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return backend


def few_letters() -> Tokenizer:
    """Drops every character but these, without a word."""
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    backend.decoder = decoders.Fuse()
    return backend


def few_bytes() -> Tokenizer:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


GREEDY = [AddedToken("<|pad|>", lstrip=True, rstrip=True, special=True), AddedToken("e" * 20)]
UNDERSTOOD = {
    "bytes": tiny_tokenizer.byte_level(),
    "long tokens": byte_level(),
    "NFC": byte_level(form="NFC"),
    "NFKC": byte_level(form="NFKC"),
    "greedy": byte_level(added=GREEDY),
    "NFC, greedy": byte_level(form="NFC", added=[*GREEDY, AddedToken("éé", normalized=True)]),
    "pieces": tiny_tokenizer.sentence_piece_like(),
    "renamed": renamed_spaces(),
    "metaspace": with_metaspace(),
    "letters": few_letters(),
    "few bytes": few_bytes(),
}
BOUNDS = {name: TokenBound.of(backend) for name, backend in UNDERSTOOD.items()}
PIECES = st.sampled_from(
    ["e", "é", "e\u0301", "\u0301", "  ", " the", "ee" * 9, "▁", "▁▁hello", " ", "<|pad|>", "\u3000", "한",
     "ㄱ", "\u1112\u1161\u11ab", "Å", "ﬁ", "ﷺ", "🙂", "\u0344", "ab", "<0x41>", "\n", "\ud7ff", "hello world"]
)  # fmt: skip
TEXTS = st.lists(PIECES | st.text(max_size=6), max_size=30).map("".join)


@pytest.mark.parametrize("name", UNDERSTOOD)
@settings(max_examples=50)
@given(text=TEXTS)
@example(text="e\u0301" * 200)
@example(text="ᾂ" * 50 + "α\u0313\u0300\u0345" * 50)
@example(text=" " * 400 + "<|pad|>" + " " * 400)
@example(text="<|pad|>" * 50)
@example(text="e" * 3000)
def test_no_text_has_fewer_tokens(name: str, text: str) -> None:
    true = len(UNDERSTOOD[name].encode(text, add_special_tokens=False).ids)
    assert BOUNDS[name].at_least(text) <= true


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_boundaries_between_pieces_hide_no_more_than_is_allowed(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = byte_level(form=form)
    bound = TokenBound.of(backend)
    for size in (1, 2, 3, 5, 50):
        monkeypatch.setattr("server.text.token_bound._PIECE", size)
        for text in ("e\u0301" * 60, "ω\u0313\u0300\u0345" * 60, "\u1112\u1161\u11ab" * 60, "x" * 200):
            assert bound.at_least(text) <= len(backend.encode(text).ids)


@pytest.mark.parametrize("name", ["bytes", "long tokens", "NFC", "NFKC", "greedy", "pieces", "renamed"])
def test_the_bound_is_of_use(name: str) -> None:
    """A long text of plain words is known to have a good part of its tokens."""
    text = "hello world, the quick brown fox. " * 3000
    assert BOUNDS[name].at_least(text) > len(UNDERSTOOD[name].encode(text).ids) / 12
    assert BOUNDS[name].at_least(text, enough=100) > 100


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
        lambda backend: setattr(backend, "normalizer", normalizers.Replace("e", "")),
        lambda backend: setattr(backend, "normalizer", normalizers.Replace(Regex("x+"), "y")),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.WhitespaceSplit()),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Split(" ", "removed")),
    ],
)
def test_what_is_not_understood_has_no_bound(change) -> None:  # type: ignore[no-untyped-def]  # of a Rust class
    backend = copied(tiny_tokenizer.sentence_piece_like())
    change(backend)
    assert TokenBound.of(backend).at_least("hello world" * 1000) == 0
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    assert TokenBound.of(words).at_least("hello world" * 1000) == 0
